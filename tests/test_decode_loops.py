"""Decoding: ten steps on one cache, prepared next to eager, the cache written in place by both."""

from __future__ import annotations

import warnings

import pytest
import torch

import nxfx
from nxfx.verification.equivalence import compare
from tests import corpus

STEPS = 10


def decode(name: str, steps: int = STEPS) -> nxfx.PreparedModule:
    """Every step equal to eager: logits, and what is in the cache afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, step = corpus.BY_NAME[name].build_cached()
        if not model.config.is_encoder_decoder:
            step.pop("attention_mask")  # as long as what was decoded so far; without it the cache says
        ours, theirs = corpus.clone(step), corpus.clone(step)
        prepared = nxfx.prepare(model, (), step)
        token = "decoder_input_ids" if "decoder_input_ids" in step else "input_ids"
        generator = torch.Generator().manual_seed(0)
        for number in range(steps):
            words = torch.randint(corpus.FIRST_WORD, corpus.VOCAB, step[token].shape, generator=generator)
            ours[token], theirs[token] = words.clone(), words.clone()
            with torch.no_grad():
                expected, actual = model(**theirs).logits, prepared(**ours).logits
            held = [list(corpus._tensors(kwargs[corpus.cache_argument(model)], set())) for kwargs in (theirs, ours)]
            outcome = compare([expected, *held[0]], [actual, *held[1]], kind="close", max_abs=1e-5, signed_zeros=False)
            assert outcome.ok, (number, outcome.mismatches)
            for kwargs in (ours, theirs):
                if "position_ids" in kwargs:
                    kwargs["position_ids"] = kwargs["position_ids"] + 1
    return prepared


@pytest.mark.parametrize("name", ["llama_static", "qwen3_static", "t5_static", "bart_static", "whisper_static"])
def test_one_capture_serves_every_step_of_a_static_cache(name: str) -> None:
    assert len(decode(name).captures) == 1


@pytest.mark.parametrize("name", ["gemma2_static", "mistral_static"])
def test_a_sliding_window_counts_in_python_and_each_count_is_a_capture(name: str) -> None:
    """The cache keeps its own length as a Python int, which decides what its code does: a stale graph is never used."""
    prepared = decode(name, 3)
    assert len(prepared.captures) == 3
    told = [f for call in prepared.captures.values() for f in call.report.findings if f.code == "NX406"]
    assert told and all("cumulative_length" in f.message and ("'cache." in f.message or "past_key_values" in f.message) for f in told)
    assert all("cumulative_length" in f.location.source for f in told), "the line of the cache that counts"
