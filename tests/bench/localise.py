"""Localisation against one eager run: time and peak memory, on a Llama with 32 layers.

    PYTHONPATH=. python tests/bench/localise.py [--layers 32] [--width 256] [--length 128]

Memory is the peak of the bytes that torch's CPU allocator holds, weights included, over those of one eager run.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from typing import Any

warnings.simplefilter("ignore")

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from nxfx.verification.localisation import Localisation
from nxfx.verification.localise import localise
from nxfx.verification.precision import Precision
from nxfx.verification.verify import _admitted, _captured


class Peak(TorchDispatchMode):
    """Bytes of the tensors that are alive, at most; those that live from before count too."""

    def __init__(self, alive: list[torch.Tensor]) -> None:
        super().__init__()
        self.seen = WeakIdKeyDictionary()
        self.now = self.peak = 0
        for tensor in alive:
            self._add(tensor)

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.seen:
            size = storage.nbytes()
            self.seen[storage] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            import weakref

            weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self._add(value)
        return result


def llama(layers: int, width: int, length: int, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """A Llama with random weights and one example."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).eval()
    return model, {"input_ids": torch.randint(0, 1024, (1, length)), "use_cache": False}


def best(function: Callable[[], Any], times: int) -> float:
    """Processor seconds of the fastest of some runs (one thread): other work on the machine does not count."""
    found = []
    for _ in range(times):
        started = time.process_time()
        function()
        found.append(time.process_time() - started)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, kwargs = llama(options.layers, options.width, options.length, getattr(torch, options.dtype))
    weights = [*model.parameters(), *model.buffers()]
    call = ((), kwargs)
    original = _captured(model, call)
    changed = copy.copy(original)
    changed.graph_module = _with_a_fault(original.graph_module)

    def eager() -> None:
        with torch.no_grad():
            model(**kwargs)

    for name, other in (("clean", original), ("one fault", changed)):

        def sweep(other: Any = other) -> Localisation:
            return localise(
                original.graph_module, _admitted(original, call), other.graph_module, _admitted(other, call), Precision(torch.float64)
            )

        eager_seconds, sweep_seconds = best(eager, 5), best(sweep, 2)
        with Peak(weights) as eager_peak:
            eager()
        with Peak(weights) as sweep_peak:
            found = sweep()
        nodes = len(original.graph_module.graph.nodes)
        print(
            f"{name}: {nodes} nodes, blamed {found.first.node if found.first else 'nobody'}; eager {eager_seconds:.3f} s, localisation "
            f"{sweep_seconds:.3f} s ({sweep_seconds / eager_seconds:.1f} times); peak {eager_peak.peak / 2**20:.1f} MB and "
            f"{sweep_peak.peak / 2**20:.1f} MB ({sweep_peak.peak / eager_peak.peak:.2f} times)"
        )


def _with_a_fault(graph_module: Any) -> Any:
    """One product near the beginning takes another factor: everything after it differs."""
    from nxfx.graph.copying import copy_graph

    other = copy_graph(graph_module)
    node = next(n for n in other.graph.nodes if n.op == "call_function" and "silu" in str(n.target))
    node.target = torch.ops.aten.gelu.default
    other.recompile()
    return other


if __name__ == "__main__":
    main()
