"""NxD's ModelBuilder, first generation, on Trn1, Inf2, Trn2. Usage: python model_builder_v1.py [trn1]"""

from __future__ import annotations

from checks import check, decoder, run, steps, target

from nxfx.environment import neuronx_distributed
from nxfx.handoff.modelbuilder import model_instance

TARGET = target("trn1")


def main() -> None:
    builder_class = neuronx_distributed("trace.model_builder").ModelBuilder
    instance = model_instance(decoder, next(steps(1)), target=TARGET, ranges={"position": (0, 63)})
    builder = builder_class(router=None, tp_degree=1, checkpoint_loader=lambda: decoder().state_dict())
    builder.add("decode", instance, instance.example_inputs, compiler_args=instance.compiler_args)
    serve, eager = instance.bind(builder.trace()), decoder()
    for token, position in steps():
        check(f"cache at position {int(position)}", eager(token, position), serve(token, position))


if __name__ == "__main__":
    run(main)
