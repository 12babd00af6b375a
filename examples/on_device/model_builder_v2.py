"""NxD's ModelBuilder, second generation, on Trn1, Inf2, Trn2. Usage: python model_builder_v2.py [trn1]"""

from __future__ import annotations

from checks import check, decoder, run, steps, target

from nxfx.environment import neuronx_distributed
from nxfx.handoff.modelbuilder import builder_module

TARGET = target("trn1")


def main() -> None:
    builder_class = neuronx_distributed().ModelBuilder
    module = builder_module(decoder(), next(steps(1)), target=TARGET, ranges={"position": (0, 63)})
    builder = builder_class(module)
    for example in module.examples:
        builder.trace(kwargs=example)
    compiled = builder.compile(compiler_args=module.compiler_args)
    compiled.set_weights([decoder().state_dict()])
    compiled.to_neuron()
    serve, eager = module.bind(compiled), decoder()
    for token, position in steps():
        check(f"cache at position {int(position)}", eager(token, position), serve(token, position))


if __name__ == "__main__":
    run(main)
