"""Small models, one construct each, that let a value reach Python, a shape or the host; then models with several sites.

The comment of a line says what is to be found there: ``# site: KIND CODE OUTCOME``, two of them joined by ``;``. A line without such
a comment is no site. Every model takes ``x`` (float32[4, 3]), ``n`` (int64[], 2) and ``mask`` (bool[4, 3]).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

SINGLE: dict[str, Callable[..., Any]] = {}
SEVERAL: dict[str, Callable[..., Any]] = {}


def single(model: Callable[..., Any]) -> Callable[..., Any]:
    SINGLE[model.__name__] = model
    return model


def several(model: Callable[..., Any]) -> Callable[..., Any]:
    SEVERAL[model.__name__] = model
    return model


# --- branches --------------------------------------------------------------------------------------------------------


@single
def bool_call(x, n, mask):
    wanted = bool(mask.any())  # site: bool() NX401 refused
    return x * wanted


@single
def if_statement(x, n, mask):
    if n > 1:  # site: if NX401 refused
        return x + 1
    return x - 1


@single
def conditional_expression(x, n, mask):
    return x if n > 1 else -x  # site: conditional expression NX401 refused


@single
def while_loop(x, n, mask):
    while n > 0:  # site: while NX401 refused
        x, n = x * 2, n - 1
    return x


@single
def assert_statement(x, n, mask):
    assert (x == x).all(), "no nan"  # site: assert NX407 reported
    return x + 1


@single
def check_that_raises(x, n, mask):
    if (x > 1e30).any():  # site: check that raises NX407 reported
        raise ValueError("too large")
    return x + 1


@single
def torch_assert(x, n, mask):
    torch._assert((x == x).all(), "no nan")  # site: torch._assert NX407 reported
    return x + 1


@single
def and_or(x, n, mask):
    both = mask.any() and mask.all()  # site: and/or NX401 refused
    return torch.where(both, x, -x)


@single
def not_operator(x, n, mask):
    none = not mask.any()  # site: not NX401 refused
    return x * none


@single
def in_tensor(x, n, mask):
    return x * (0.5 in x)  # site: in NX401 refused


@single
def tensor_in_list(x, n, mask):
    return x * (n in [1, 2])  # site: in NX401 refused


@single
def equal(x, n, mask):
    return x + torch.equal(x, x * 2)  # site: torch.equal NX401 refused


@single
def allclose(x, n, mask):
    return x + torch.allclose(x, x * 2)  # site: torch.allclose NX401 refused


@single
def python_max(x, n, mask):
    return x * max(n, n * n)  # site: max() NX401 refused


# --- numbers and text ------------------------------------------------------------------------------------------------


@single
def item(x, n, mask):
    return x * x.max().item()  # site: .item() NX402 removed


@single
def int_call(x, n, mask):
    return x * int(n)  # site: int() NX402 refused


@single
def float_call(x, n, mask):
    return x * float(n)  # site: float() NX402 refused


@single
def math_function(x, n, mask):
    return x * math.sqrt(n)  # site: float() NX402 refused


@single
def tolist(x, n, mask):
    return x * sum(x[0].tolist())  # site: .tolist() NX402 reported


@single
def numpy_array(x, n, mask):
    return x + torch.from_numpy(x.numpy() * 2)  # site: .numpy() NX402 refused


@single
def numpy_function(x, n, mask):
    return x * float(np.asarray(x).shape[0])  # site: numpy conversion NX402 refused


@single
def cpu(x, n, mask):
    return x.cpu() + 1  # site: .cpu() NX402 removed


@single
def to_cpu(x, n, mask):
    return x.to("cpu") + 1  # site: .cpu() NX402 removed


@single
def printed(x, n, mask):
    print(x)  # site: print() NX402 removed
    return x + 1


@single
def f_string(x, n, mask):
    text = f"step {n}"  # site: f-string NX402 reported
    return x * len(text)


@single
def range_of_tensor(x, n, mask):
    for _ in range(n):  # site: range() NX402 refused
        x = x * 2
    return x


@single
def list_index(x, n, mask):
    return x * [1.0, 2.0, 3.0][n]  # site: list index NX402 refused


@single
def tensor_of_tensors(x, n, mask):
    return x[0] * torch.tensor([n, n, 1])  # site: torch.tensor of tensors NX402 refused


@single
def number_argument(x, n, mask):
    return x + torch.full((3,), n)  # site: number argument NX402 reported


# --- sizes, bounds, positions ----------------------------------------------------------------------------------------


@single
def size(x, n, mask):
    return torch.zeros(n, 3)  # site: size NX403 refused


@single
def arange_size(x, n, mask):
    return torch.arange(n).sum() + x  # site: size NX403 refused


@single
def slice_read(x, n, mask):
    return x[:n].sum() + x  # site: slice bound NX404 removed


@single
def slice_write(x, n, mask):
    x = x.clone()
    x[:n] = 0  # site: slice bound NX404 removed
    return x


@single
def narrow_bound(x, n, mask):
    return x.narrow(0, n, 1)  # site: narrow bound NX404 refused


@single
def tensor_index(x, n, mask):
    return x[n] * 2  # site: tensor index NX402 removed


@single
def top_k(x, n, mask):
    return x.topk(n).values  # site: k NX403 refused


@single
def repeats(x, n, mask):
    return x.repeat_interleave(torch.stack([n, n, n, n]), 0)  # site: repeats NX403 reported


@single
def nonzero(x, n, mask):
    return mask.nonzero()  # site: nonzero NX403 reported


@single
def where_condition(x, n, mask):
    return torch.where(mask)[0]  # site: where(condition) NX403 reported


@single
def boolean_read(x, n, mask):
    return x[mask].sum()  # site: boolean read NX403 reported


@single
def boolean_write(x, n, mask):
    x = x.clone()
    x[mask] = 0.0  # site: boolean write NX403 removed
    return x


@single
def unique(x, n, mask):
    return x.unique()  # site: unique NX403 reported


@single
def masked_select(x, n, mask):
    return x.masked_select(mask).sum()  # site: masked_select NX403 reported


@single
def one_hot(x, n, mask):
    return F.one_hot(n)  # site: one_hot NX403 refused


@single
def bincount(x, n, mask):
    return torch.bincount(mask.long().flatten())  # site: bincount NX403 reported


@single
def bucketize(x, n, mask):
    return torch.bucketize(x, x[0].sort().values)  # site: bucketize NX411 reported


# --- random numbers --------------------------------------------------------------------------------------------------


@single
def multinomial(x, n, mask):
    return torch.multinomial(x.abs() + 1, 1)  # site: multinomial NX405 reported


@single
def random_like(x, n, mask):
    return x + torch.rand_like(x)  # site: rand_like NX405 reported


@single
def dropout(x, n, mask):
    return F.dropout(x, 0.5, training=True)  # site: dropout NX405 reported


# --- nothing to find -------------------------------------------------------------------------------------------------


@single
def clean(x, n, mask):
    """What looks like a site and is none: shapes, dtypes, constants, a dropout that is off, classes that are said."""
    if x.shape[0] > 2 and x.dtype is torch.float32 and len(x) > 1 and x.is_contiguous():
        x = x.to(mask.device).clamp(min=n).masked_fill(mask, 0.0)
    for row in x:
        x = x + row
    hot = F.one_hot(mask.long(), 2).sum()
    return F.dropout(x, 0.5, training=False) + torch.where(mask, x, n) * hot, f"{x.shape} {x.dtype}"


# --- several sites in one forward ------------------------------------------------------------------------------------


def helper(x):
    return x.abs().max().item()  # site: .item() NX402 refused


@several
def sampler(x, n, mask):
    if n > 0:  # site: if NX401 refused
        x = x / 2
    kept = x[mask]  # site: boolean read NX403 refused
    if torch.any(x < 1.0):  # site: if NX401 refused
        x = x + 1
    drawn = torch.multinomial(x.softmax(-1), 1)  # site: multinomial NX405 refused
    return drawn + kept.sum()


@several
def helpers(x, n, mask):
    first = helper(x)
    second = helper(x * first)
    return x * int(n) + second  # site: int() NX402 refused


@several
def loop_and_break(x, n, mask):
    for _ in range(8):
        x = x * 0.5
        if (x.abs() < 0.1).all():  # site: if NX401 refused
            break
    return x + float(n)  # site: float() NX402 refused


@several
def printed_debugging(x, n, mask):
    print("x", x)  # site: print() NX402 refused
    name = f"{n:d}"  # site: f-string NX402 refused
    rows = x.tolist()  # site: .tolist() NX402 refused
    return x[: int(n)] * len(name) * len(rows)  # site: int() NX402 refused


@several
def one_line(x, n, mask):
    return x * float(n) if n > 1 and not mask.all() else x  # site: float() NX402 refused; conditional expression NX401 refused


@several
def sizes(x, n, mask):
    a = torch.zeros(n)  # site: size NX403 refused
    b = x.topk(n).values  # site: k NX403 refused
    c = torch.arange(n)  # site: size NX403 refused
    return a.sum() + b.sum() + c.sum()


@several
def early_returns(x, n, mask):
    if n == 7:  # site: if NX401 refused
        return x
    if n == 2:  # site: if NX401 refused
        x = x + 1
        if mask.any():  # site: if NX401 refused
            return x * 2
    return -x


@several
def numpy_detour(x, n, mask):
    table = x.numpy()  # site: .numpy() NX402 refused
    index = int(table.argmax())
    assert n < 10  # site: assert NX407 refused
    return x.flatten()[index] * n.item()  # site: .item() NX402 refused


@several
def lists(x, n, mask):
    layers = [torch.sin, torch.cos, torch.tanh]
    x = layers[n](x)  # site: list index NX402 refused
    for layer in layers[:n]:  # site: Python integer NX402 refused
        x = layer(x)
    return sorted([x[0, 0], x[0, 1]])[0]  # site: sorted() NX401 refused


@several
def noise(x, n, mask):
    x = F.dropout(x, 0.1, training=True)  # site: dropout NX405 refused
    x = x + torch.randn_like(x)  # site: randn_like NX405 refused
    while x.sum() < 0:  # site: while NX401 refused
        x = x + 1
    return x, mask.nonzero()  # site: nonzero NX403 refused
