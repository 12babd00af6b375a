"""What a value-dependent construct becomes on the way to Neuron, and what to write instead.

Sources: a legacy trace executes the model lazily and runs what it has as soon as Python wants a value (torch-xla 2.9,
``PT_XLA_DEBUG_LEVEL=2``); TorchNeuron compiles with ``fullgraph=True`` and refuses ``dynamic=True``; Dynamo breaks the
graph at a data-dependent value unless ``capture_scalar_outputs`` or ``capture_dynamic_output_shape_ops`` is set.
"""

from __future__ import annotations

from dataclasses import dataclass

_ROUTES = "TorchNeuron (fullgraph=True) refuses it; torch.compile breaks the graph here."
BRANCH = f"A legacy trace bakes in the side the example takes; {_ROUTES}"
VALUE = f"A legacy trace bakes in the example's value; {_ROUTES}"
SIZE = f"A legacy trace freezes the example's size; {_ROUTES}"
BOUND = f"A legacy trace freezes the example's bound; {_ROUTES}"
CHECK = "A legacy trace checks the example once and drops the check; the compiled model does not check."
RANDOM = (
    "The device draws from its own generator: other numbers than a CPU's under the same seed, so compare by statistics."
)
HOST = "torch-xla 2.9 has no lowering for it: a legacy trace computes it on the host and bakes in the example's result."
STATE = "Capture runs forward once: what it does to Python objects is baked in, and wrong from the second call on."


BECOMES = {
    "NX401": BRANCH, "NX402": VALUE, "NX403": SIZE, "NX404": BOUND, "NX405": RANDOM, "NX406": STATE, "NX407": CHECK, "NX411": HOST,
}  # fmt: skip


@dataclass(frozen=True)
class Advice:
    """How to report one construct.

    Attributes:
        code: finding code.
        becomes: what it becomes on each route.
        fix: what to write instead.
    """

    code: str
    becomes: str
    fix: str


_CHOOSE = "compute both sides and choose: torch.where(condition, a, b); or decide by a Python flag before compiling"
_LOGIC = "combine conditions as tensors: a & b, a | b, ~a; then choose with torch.where(condition, a, b)"
_STAY = "stay with tensors: a 0-d tensor serves in arithmetic, in torch.where and as a position x[t]"
_FIXED_SIZE = "pick a fixed maximum N, compute all N and mask the rest: torch.where(torch.arange(N) < t, value, 0)"
_NUMPY = "write it in torch; or compute it before the call and pass it in as a tensor"
_LOOP = "run a fixed number of steps and mask the finished ones: x = torch.where(active, step(x), x)"

# By the construct's kind, or by the last part of the name of what is called.
SYNTAX: dict[str, Advice] = {
    "if": Advice("NX401", BRANCH, _CHOOSE),
    "conditional": Advice("NX401", BRANCH, _CHOOSE),
    "while": Advice("NX401", BRANCH, _LOOP),
    "and-or": Advice("NX401", BRANCH, _LOGIC),
    "not": Advice("NX401", BRANCH, _LOGIC),
    "in": Advice("NX401", BRANCH, "compare as tensors: (x == value).any(), and choose with torch.where"),
    "assert": Advice(
        "NX407",
        CHECK,
        "check the value on the host before the call, or drop the check; shapes may be checked as before",
    ),
    "loop": Advice("NX403", SIZE, _FIXED_SIZE),
    "format": Advice("NX402", VALUE, "keep text out of forward: return the tensor and format it outside the model"),
    "write": Advice(
        "NX404",
        BOUND,
        "write through a mask, for the last dimension: x = torch.where(torch.arange(x.shape[-1]) < n, value, x)",
    ),
    "read": Advice(
        "NX402",
        VALUE,
        "a tensor takes a tensor as position, x[t]; of a list make a tensor first: torch.stack(items)[t]",
    ),
    "slice": Advice(
        "NX404",
        BOUND,
        "read all of it and mask the rest, for the last dimension: torch.where(torch.arange(x.shape[-1]) < n, x, 0)",
    ),
}
CALLS: dict[str, Advice] = {
    "bool": SYNTAX["if"],
    "is_nonzero": SYNTAX["if"],
    "equal": Advice("NX401", BRANCH, "compare without leaving the device: (a == b).all(), and choose with torch.where"),
    "allclose": Advice(
        "NX401", BRANCH, "compare without leaving the device: torch.isclose(a, b).all(), and choose with torch.where"
    ),
    **dict.fromkeys(("int", "float", "complex", "item", "index"), Advice("NX402", VALUE, _STAY)),
    "tolist": Advice(
        "NX402",
        VALUE,
        "use the tensor itself: x[indices] takes an index tensor; loop with .unbind(), which gives tensors",
    ),
    "range": Advice("NX402", VALUE, _LOOP),
    **dict.fromkeys(("numpy", "array", "asarray", "ascontiguousarray"), Advice("NX402", VALUE, _NUMPY)),
    **dict.fromkeys(
        ("min", "max", "sorted", "sum"),
        Advice("NX402", VALUE, "use torch.minimum, torch.maximum, torch.sort or .sum(): they stay on the device"),
    ),
    **dict.fromkeys(("str", "format", "print", "repr"), SYNTAX["format"]),
    "len": Advice("NX403", SIZE, "count with a tensor: mask.sum(), and compare with torch.where"),
    **dict.fromkeys(
        ("nonzero", "argwhere", "where"),
        Advice("NX403", SIZE, "keep the full shape: torch.where(condition, value, 0); or count and rank with cumsum"),
    ),
    "masked_select": Advice(
        "NX403", SIZE, "keep the full shape: torch.where(mask, x, 0), and divide sums by mask.sum()"
    ),
    **dict.fromkeys(
        ("unique", "unique_consecutive"),
        Advice(
            "NX403", SIZE, "compute it before the call; or sort and mark where neighbours differ, which keeps the shape"
        ),
    ),
    "one_hot": Advice("NX403", SIZE, "say how many classes there are: one_hot(x, num_classes=N)"),
    "bincount": Advice("NX403", SIZE, "count against a fixed range: (x[:, None] == torch.arange(N)).sum(0)"),
    "repeat_interleave": Advice(
        "NX403", SIZE, "gather with a fixed total N: x[(torch.arange(N)[:, None] >= repeats.cumsum(0)).sum(1)]"
    ),
    "topk": Advice("NX403", SIZE, "take a fixed maximum k and mask: torch.where(torch.arange(k) < n, values, 0)"),
    **dict.fromkeys(
        ("split", "tensor_split", "split_with_sizes", "chunk"),
        Advice("NX403", SIZE, "keep the tensor whole and mask the parts, with bounds from sizes.cumsum(0)"),
    ),
    "narrow": Advice("NX404", BOUND, "take a fixed number from a tensor-valued start: x[start + torch.arange(N)]"),
    "select": Advice("NX404", BOUND, "index with the tensor: x[t]"),
}
EMPTY = Advice("NX403", SIZE, "ask the mask instead of the size: mask.any(), and choose with torch.where")
READ_MASK = Advice("NX403", SIZE, "keep the full shape: torch.where(mask, x, 0), and divide sums by mask.sum()")
WRITE_MASK = Advice("NX403", SIZE, "write through the mask: x = torch.where(mask, value, x)")
DATA_SIZE = Advice("NX403", SIZE, _FIXED_SIZE)
DATA_VALUE = Advice("NX402", VALUE, _STAY)
OPERAND = Advice(
    "NX402", VALUE, "use the 0-d tensor itself: x * t instead of x * t.item() (t.to(x.dtype) where t would promote x)"
)
RETURNED = Advice("NX402", VALUE, "return the 0-d tensor and call .item() outside the model")
UNUSED = Advice("NX402", VALUE, "delete the read: nothing in the graph uses it")
MULTINOMIAL = Advice(
    "NX405", RANDOM, "draw with Gumbel noise passed in as an input: (probabilities.log() + noise).argmax(-1)"
)
DROPOUT = Advice("NX405", RANDOM, "for inference call model.eval() before preparing the model; for training leave it")
DRAW = Advice("NX405", RANDOM, "to compare with a CPU, draw the noise outside and pass it in as an input")
LITERAL = Advice("NX402", VALUE, "join them as tensors: torch.stack([a, b])")
COPY = "A legacy trace stops, runs what it has and goes on from the copy; on the device it is a wait for the host."
HOST_COPY = Advice("NX402", COPY, "leave the tensor where it is, and call .cpu() on the model's results")
PYTHON_STATE = Advice("NX406", STATE, "register it as a buffer and update it in place with tensor operations; or pass it in and return it")
HOST_RANDOM = Advice("NX406", STATE, "draw with a torch random op, or outside the model and pass the numbers in")
# Operators that torch-xla runs on the host.
HOST_FIXES: dict[str, str] = {
    "bucketize": "count the boundaries below: (boundaries < x[..., None]).sum(-1), with <= for right=True",
    "searchsorted": "count the boundaries below: (boundaries < x[..., None]).sum(-1), with <= for right=True",
    "nonzero_static": CALLS["nonzero"].fix,
    "histc": "for integers from 0 to N - 1: (x[:, None] == torch.arange(N)).sum(0)",
}
