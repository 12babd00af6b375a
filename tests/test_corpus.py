"""Real architectures through `prepare`: exact against the captured graph, close to eager, every kept 64-bit edge explained.

A part of the corpus, chosen so that every family and every hard construct stands in it; `python tests/corpus_run.py` runs all of
it and writes docs/corpus.md.
"""

from __future__ import annotations

import pytest
import torch

from tests import corpus, corpus_run

DENSE = (
    "llama llama_static llama_eager llama_long_rope mistral_static ministral qwen2 qwen3 gemma gemma2 gemma3n_text phi3 gpt2 "
    "gpt_neo gptj opt bloom falcon_alibi mpt cohere glm4"
)
MOE = "mixtral qwen2_moe deepseek_v2 deepseek_v3 gpt_oss granitemoe llama4_text"
LINEAR = "mamba mamba2 jamba bamba recurrent_gemma qwen3_next lfm2 rwkv"
ENCODERS = "bert roberta distilbert albert deberta_v2 modernbert big_bird xlnet"
ENCDEC = "t5 t5_static bart_static marian pegasus fsmt"
VISION = "vit deit swin swinv2 convnext beit dinov2 segformer resnet"
AUDIO = "wav2vec2 hubert whisper whisper_static audio_spectrogram_transformer"
MULTIMODAL = "clip siglip blip llava mllama paligemma"
REFUSED = "llama_dynamic_rope dbrx longformer vilt qwen2_vl"

# One precision is enough where the graph is large.
LARGE = {"gemma3n_text", "qwen3_next", "big_bird", "rwkv", "zamba"}


def _cases() -> list[object]:
    cases = []
    for name in " ".join((DENSE, MOE, LINEAR, ENCODERS, ENCDEC, VISION, AUDIO, MULTIMODAL)).split():
        entry = corpus.BY_NAME.get(name)
        if entry is None:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            for cached in (False, True) if entry.cached else (False,):
                if name in LARGE and (dtype is torch.bfloat16) == cached:
                    continue
                label = f"{name}-{str(dtype).removeprefix('torch.')}{'-cached' if cached else ''}"
                cases.append(pytest.param(name, dtype, cached, id=label))
    return cases


CASES = _cases()


@pytest.mark.corpus
@pytest.mark.parametrize(("name", "dtype", "cached"), CASES)
def test_prepared(name: str, dtype: torch.dtype, cached: bool) -> None:
    row = corpus_run.run(corpus.BY_NAME[name], dtype, cached)
    assert row.verdict in ("exact", "refines"), row.why
    assert not row.problems, row.problems


@pytest.mark.corpus
@pytest.mark.parametrize("name", REFUSED.split())
def test_refused_with_the_line(name: str) -> None:
    """Value dependence that needs a branch: refused, naming code and line; never a wall of torch's internals."""
    row = corpus_run.run(corpus.BY_NAME[name], torch.float32, False)
    assert row.verdict == "refused"
    assert row.why.startswith("NX4"), row.why
    assert not row.problems, row.problems


@pytest.mark.corpus
@pytest.mark.parametrize("name", ["llama", "bert", "mixtral", "t5", "swin"])
def test_every_pass_keeps_the_invariants(name: str) -> None:
    row = corpus_run.run(corpus.BY_NAME[name], torch.bfloat16, False, verify_each=True)
    assert not row.problems, row.problems


def test_at_least_forty_architectures() -> None:
    names = {str(case.values[0]) for case in CASES}  # type: ignore[attr-defined]
    assert len({corpus.BY_NAME[n].model_type for n in names}) >= 40
    assert {corpus.BY_NAME[n].family for n in names} >= {
        "dense", "moe", "linear", "encoder", "encdec", "vision", "audio", "multimodal",
    }  # fmt: skip
