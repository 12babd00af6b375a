"""Tiny random-weight `transformers` architectures: the real models that nxfx is tested against.

`CORPUS` is a table of entries, built lazily and independent of nxfx; `vary` makes a second set of inputs::

    entry = BY_NAME["llama"]
    model, kwargs = entry.build(torch.bfloat16)          # no cache; kwargs are the keyword arguments of one forward
    model, kwargs = entry.build_cached(torch.bfloat16)   # one decode step on a cache that an eager prefill filled
    others = vary(kwargs, seed=1)                        # same shapes and dtypes, other tokens, padding, pixels, cache

A call may write its cache: pass `clone(kwargs)` when the same inputs are used twice.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, StaticCache

Kwargs = dict[str, Any]
Inputs = Callable[[Any], Kwargs]

VOCAB = 99
PAD, BOS, EOS, IMAGE, FIRST_WORD = 0, 1, 2, 9, 12  # ids below FIRST_WORD are special: `vary` leaves them in place
BATCH, LENGTH, CACHE_LENGTH, PIXELS = 2, 12, 24, 32


@dataclass(frozen=True)
class Entry:
    """One architecture: `model_type` and `overrides` make its config, `auto` its model, `inputs` its example."""

    name: str
    family: str
    model_type: str
    auto: str
    inputs: Inputs
    overrides: Mapping[str, Any] = field(repr=False)
    cache: str = ""  # "", "dynamic", "static" or "own" (whatever the model makes itself)
    attention: str | None = None
    bf16_failure: str = ""  # why eager itself fails in bf16
    random: bool = False  # draws random numbers in forward: compare under one seed
    stateful: bool = False  # its modules change in forward: give each call its own copy of the model
    note: str = ""

    @property
    def cached(self) -> bool:
        return bool(self.cache)

    def build(self, dtype: torch.dtype = torch.float32) -> tuple[Any, Kwargs]:
        """The model in eval mode and the keyword arguments of one forward without a cache."""
        model = self._model(dtype)
        kwargs = self._example(model, dtype)
        if model.can_generate() or "use_cache" in inspect.signature(model.forward).parameters:
            kwargs["use_cache"] = False
        return model, kwargs

    def build_cached(self, dtype: torch.dtype = torch.float32) -> tuple[Any, Kwargs]:
        """The model and a decode step: one new token on a cache filled by an eager prefill of this model."""
        if not self.cached:
            raise ValueError(f"{self.name} has no decode step")
        model = self._model(dtype)
        kwargs = self._example(model, dtype)
        step = _decode_encdec if model.config.is_encoder_decoder else _decode
        with torch.no_grad():
            return model, step(model, kwargs, self._empty_cache(model))

    def _model(self, dtype: torch.dtype) -> Any:
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(self.model_type, **copy.deepcopy(dict(self.overrides)))
        options = {"attn_implementation": self.attention} if self.attention else {}
        cls = getattr(transformers, self.auto)
        make = cls.from_config if self.auto.startswith("Auto") else cls._from_config
        model = make(config, dtype=dtype, **options).eval()
        with torch.no_grad():
            strict = tuple(model._keep_in_fp32_modules_strict or ())
            for name, parameter in model.named_parameters():  # dtypes as `from_pretrained` leaves them
                parameter.data = parameter.data.to(torch.float32 if any(k in name for k in strict) else dtype)
            _roughen(model)
        return model

    def _example(self, model: Any, dtype: torch.dtype) -> Kwargs:
        torch.manual_seed(1)
        return {k: v.to(dtype) if _is_float(v) else v for k, v in self.inputs(model.config).items()}

    def _empty_cache(self, model: Any) -> Cache | None:
        config = model.config.get_text_config(decoder=True)
        if self.cache == "own":
            return None
        cache: Cache = StaticCache(config, CACHE_LENGTH) if self.cache == "static" else DynamicCache(config=config)
        if not model.config.is_encoder_decoder:
            return cache
        length = getattr(config, "max_source_positions", LENGTH)
        other = StaticCache(config, length) if self.cache == "static" else DynamicCache(config=config)
        return EncoderDecoderCache(cache, other)


def _roughen(model: Any) -> None:
    """Biases and code books start as zeros, norm weights as ones, deep convolutions fade: a fault would not show."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # some models draw its weight around zero
            torch.nn.init.ones_(module.weight)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.05 * torch.randn_like(parameter))
        elif parameter.dim() == 4:
            torch.nn.init.kaiming_normal_(parameter)
    for buffer in model.buffers():
        if _is_float(buffer) and buffer.dim() and not buffer.any():
            buffer.add_(0.1 * torch.randn_like(buffer))


def cache_argument(model: Any) -> str:
    """What the model calls its cache: transformers 5.24 renamed ``past_key_values`` and ``cache_params``."""
    return next(k for k in ("cache", "past_key_values", "cache_params", "state") if k in inspect.signature(model.forward).parameters)


def _decode(model: Any, kwargs: Kwargs, cache: Cache | None) -> Kwargs:
    """Prefill with `kwargs`, then the arguments of the next token's step, position ids as `generate` makes them."""
    names = inspect.signature(model.forward).parameters
    keyword = cache_argument(model)
    mrope = "image_grid_thw" in names
    with_positions = "position_ids" in names and not mrope
    mask = kwargs.get("attention_mask")
    prefill = kwargs | {"use_cache": True}
    if with_positions and mask is not None:
        prefill["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    if cache is not None:
        prefill[keyword] = cache
    filled = model(**prefill)
    step: Kwargs = {"input_ids": _words(1), keyword: getattr(filled, keyword, cache), "use_cache": True}
    if mask is not None and keyword != "cache_params":
        step["attention_mask"] = torch.cat([mask, mask.new_ones(BATCH, 1)], -1)
        last = step["attention_mask"].sum(-1, keepdim=True) - 1
        if "position_ids" in names:
            step["position_ids"] = (last + model.model.rope_deltas).expand(3, BATCH, 1) if mrope else last
    return step


def _decode_encdec(model: Any, kwargs: Kwargs, cache: Cache | None) -> Kwargs:
    """The same for an encoder-decoder: the step is given the encoder's outputs."""
    encoder_outputs = model.get_encoder()(**{k: v for k, v in kwargs.items() if not k.startswith("decoder_")})
    shared = {"encoder_outputs": encoder_outputs, "use_cache": True}
    shared |= {k: v for k, v in kwargs.items() if k == "attention_mask"}
    keyword = cache_argument(model)
    filled = model(**shared, decoder_input_ids=kwargs["decoder_input_ids"], **{keyword: cache})
    return shared | {"decoder_input_ids": _words(1), keyword: getattr(filled, keyword)}


# -- inputs ------------------------------------------------------------------------------------------------------------


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _words(length: int) -> Tensor:
    return torch.randint(FIRST_WORD, VOCAB, (BATCH, length))


def _padded(ids: Tensor, side: str, pad: int = 3) -> Kwargs:
    """`ids` with the second row padded by `pad` tokens on one side, and the attention mask that says so."""
    mask = torch.ones_like(ids)
    where = slice(None, pad) if side == "left" else slice(-pad, None)
    ids[1, where], mask[1, where] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def text() -> Inputs:
    """Left padding, as decoders are batched."""
    return lambda config: _padded(_words(LENGTH), "left")


def encoder_text(length: int = LENGTH) -> Inputs:
    """Right padding behind a first [CLS]-like token."""

    def inputs(config: Any) -> Kwargs:
        ids = _words(length)
        ids[:, 0] = BOS
        return _padded(ids, "right")

    return inputs


def pair() -> Inputs:
    """Encoder tokens, right padded, and decoder tokens."""
    return lambda config: _padded(_words(LENGTH), "right") | {"decoder_input_ids": _words(7)}


def image(size: int = PIXELS) -> Inputs:
    return tensors(pixel_values=(BATCH, 3, size, size))


def tensors(**shapes: tuple[int, ...]) -> Inputs:
    return lambda config: {name: torch.randn(shape) for name, shape in shapes.items()}


def waveform(samples: int = 1200) -> Inputs:
    """Raw audio, the second row padded by a sixth."""

    def inputs(config: Any) -> Kwargs:
        mask = torch.ones(BATCH, samples, dtype=torch.int64)
        mask[1, -samples // 6 :] = 0
        return {"input_values": torch.randn(BATCH, samples) * mask, "attention_mask": mask}

    return inputs


def series(past: int, future: int) -> Inputs:
    """A univariate series with two time features, its first row's oldest values unobserved."""

    def inputs(config: Any) -> Kwargs:
        observed = torch.ones(BATCH, past)
        observed[0, :3] = 0
        values = tensors(
            past_values=(BATCH, past),
            past_time_features=(BATCH, past, 2),
            future_values=(BATCH, future),
            future_time_features=(BATCH, future, 2),
        )
        return values(config) | {"past_observed_mask": observed.bool()}

    return inputs


def spectrogram_to_text(*shape: int) -> Inputs:
    return lambda config: {"input_features": torch.randn(BATCH, *shape), "decoder_input_ids": _words(7)}


def text_image(tokens: int, side: str = "left", pixels: tuple[int, ...] | None = None) -> Inputs:
    """Text with `tokens` image placeholders a row in the middle, and one image a row."""

    def inputs(config: Any) -> Kwargs:
        ids = _words(LENGTH + tokens)
        ids[:, 4 : 4 + tokens] = IMAGE
        shape = pixels or (BATCH, 3, PIXELS, PIXELS)
        return _padded(ids, side) | {"pixel_values": torch.randn(shape)}

    return inputs


def qwen_image() -> Inputs:
    """One 4 × 4 grid of 4-pixel patches a row, merged 2 × 2 to four tokens between the vision markers."""

    def inputs(config: Any) -> Kwargs:
        grid = {"image_grid_thw": torch.tensor([[1, 4, 4]] * BATCH)}
        out = text_image(4, pixels=(BATCH * 16, 3 * 2 * 4 * 4))(config) | grid
        out["input_ids"][:, 3], out["input_ids"][:, 8] = 7, 8
        return out | {"mm_token_type_ids": (out["input_ids"] == IMAGE).int()}

    return inputs


# -- a second set of inputs --------------------------------------------------------------------------------------------

_TOKENS = ("input_ids", "decoder_input_ids")
_VARY_STREAM = 1_000_003  # away from the seed of the examples


def clone(value: Any) -> Any:
    """A deep copy: a forward writes its cache."""
    return copy.deepcopy(value)


def vary(kwargs: Kwargs, seed: int) -> Kwargs:
    """Other valid inputs of the same shapes and dtypes; `kwargs` is left alone.

    Words become other words, padding gets another length (never none where there was some), floats another normal
    sample. Special tokens, positions, grids and sizes stay. Cache contents are permuted along the last dimension, so
    that the empty slots of a static cache stay empty.
    """
    generator = torch.Generator().manual_seed(_VARY_STREAM + seed)
    return {name: _vary_argument(name, value, generator) for name, value in kwargs.items()} | _vary_padding(
        kwargs, generator
    )


def _vary_argument(name: str, value: Any, generator: torch.Generator) -> Any:
    if isinstance(value, Tensor):
        if name in _TOKENS:
            other = torch.randint(FIRST_WORD, VOCAB, value.shape, generator=generator, dtype=value.dtype)
            return torch.where(value >= FIRST_WORD, other, value)
        if _is_float(value):
            return torch.randn(value.shape, generator=generator).to(value.dtype)
        return value.clone()
    other = clone(value)
    for tensor in _tensors(other, set()):
        if _is_float(tensor) and tensor.dim() > 1:
            with torch.no_grad():
                tensor.copy_(tensor[..., torch.randperm(tensor.shape[-1], generator=generator)])
    return other


def _vary_padding(kwargs: Kwargs, generator: torch.Generator) -> Kwargs:
    """Masks of other lengths on the side that was padded. Ids follow: pads become words, words become pads."""
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.is_floating_point() or bool(mask.all()):
        return {}
    pads = [0, int((mask == 0).sum(-1).max())]
    pads[1] = max(1, pads[1] - int(torch.randint(0, 3, (), generator=generator)))
    pads[0] = int(torch.randint(0, pads[1] + 1, (), generator=generator))
    left = bool((mask[:, 0] == 0).any())
    place = torch.arange(mask.shape[1])
    place = place if left else place.flip(0)
    keep = place >= torch.tensor(pads)[:, None]
    out: Kwargs = {"attention_mask": keep.to(mask.dtype)}
    ids = kwargs.get("input_ids")
    if isinstance(ids, Tensor) and ids.shape == mask.shape:
        words = torch.randint(FIRST_WORD, VOCAB, ids.shape, generator=generator)
        ids = torch.where((ids >= FIRST_WORD) | (ids == PAD), words, ids)
        out["input_ids"] = torch.where(keep | (ids < FIRST_WORD), ids, PAD)
    return out


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor inside lists, dicts, caches and their layers, once each."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, Mapping):
        children = list(value.values())
    elif isinstance(value, (list, tuple)):
        children = list(value)
    else:
        module = type(value).__module__
        children = list(vars(value).values()) if module.startswith("transformers") and "config" not in module else []
    for child in children:
        yield from _tensors(child, seen)


# -- configs -----------------------------------------------------------------------------------------------------------

_TOKEN_IDS = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_TRANSFORMER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
}
_DECODER = _TOKEN_IDS | _TRANSFORMER | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
_ENCODER = _TOKEN_IDS | _TRANSFORMER | {"max_position_embeddings": 64, "type_vocab_size": 2}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "init_std": 0.1,
    "decoder_start_token_id": EOS,
    "forced_eos_token_id": None,
    "forced_bos_token_id": None,
}
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "decoder_start_token_id": PAD,
}
_VIT = _TRANSFORMER | {"image_size": PIXELS, "patch_size": 8}
_TOWER = _TRANSFORMER | {"image_size": PIXELS, "patch_size": 16, "projection_dim": 32}
_CONV_STEM = {
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 3,
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_QWEN_VISION = {
    "depth": 2,
    "embed_dim": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}


def _nested(model_type: str, base: Mapping[str, Any] = _DECODER, **overrides: Any) -> Kwargs:
    return {**base, **overrides, "model_type": model_type}


# -- rows --------------------------------------------------------------------------------------------------------------

_OPTIONS = ("auto", "inputs", "cache", "attention", "bf16_failure", "random", "stateful", "note")


_ABSENT = object()  # takes a key of the family's base away, for a config that computes it


def _row(name: str, family: str, defaults: Kwargs, base: Mapping[str, Any], given: Kwargs) -> Entry:
    options = defaults | {k: given.pop(k) for k in _OPTIONS if k in given}
    model_type = given.pop("model_type", name)
    overrides = {k: v for k, v in {**base, **given}.items() if v is not _ABSENT}
    return Entry(name, family, model_type, overrides=overrides, **options)


def _decoder(name: str, family: str = "dense", **given: Any) -> Entry:
    defaults: Kwargs = {"auto": "AutoModelForCausalLM", "inputs": text(), "cache": "dynamic"}
    return _row(name, family, defaults, _DECODER, given)


def _moe(name: str, **given: Any) -> Entry:
    return _decoder(name, "moe", **_EXPERTS | given)


def _linear(name: str, **given: Any) -> Entry:
    return _decoder(name, "linear", **given)


def _encoder(name: str, **given: Any) -> Entry:
    return _row(name, "encoder", {"auto": "AutoModel", "inputs": encoder_text()}, _ENCODER, given)


def _encdec(name: str, base: Mapping[str, Any], **given: Any) -> Entry:
    defaults: Kwargs = {"auto": "AutoModelForSeq2SeqLM", "inputs": pair(), "cache": "dynamic"}
    return _row(name, "encdec", defaults, {**_TOKEN_IDS, **base}, given)


def _vision(name: str, base: Mapping[str, Any] = _VIT, **given: Any) -> Entry:
    return _row(name, "vision", {"auto": "AutoModel", "inputs": image()}, base, given)


def _audio(name: str, base: Mapping[str, Any] = _TRANSFORMER | _CONV_STEM, **given: Any) -> Entry:
    return _row(name, "audio", {"auto": "AutoModel", "inputs": waveform()}, base, given)


def _multimodal(name: str, inputs: Inputs, **given: Any) -> Entry:
    defaults: Kwargs = {"auto": "AutoModelForImageTextToText", "inputs": inputs}
    return _row(name, "multimodal", defaults, {}, given)


_DEEPSEEK = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
_MAMBA2 = {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4}
_GATED_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
}
_PER_LAYER = ["sliding_attention", "full_attention"]

CORPUS: tuple[Entry, ...] = (
    _decoder("llama"),
    _decoder("llama_eager", model_type="llama", attention="eager"),
    _decoder("llama_static", model_type="llama", cache="static"),
    _decoder(
        "llama_long_rope",
        model_type="llama",
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    _decoder(
        "llama_dynamic_rope",
        model_type="llama",
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    ),
    _decoder("mistral", sliding_window=8),
    _decoder("mistral_static", model_type="mistral", sliding_window=8, cache="static"),
    _decoder("ministral", sliding_window=8, layer_types=_PER_LAYER),
    _decoder("qwen2"),
    _decoder("qwen2_eager", model_type="qwen2", attention="eager"),
    _decoder("qwen3"),
    _decoder("qwen3_static", model_type="qwen3", cache="static"),
    _decoder("gemma"),
    _decoder("gemma2", sliding_window=8, layer_types=_PER_LAYER),
    _decoder("gemma2_static", model_type="gemma2", sliding_window=8, layer_types=_PER_LAYER, cache="static"),
    _decoder("gemma3_text", sliding_window=8, layer_types=_PER_LAYER),
    _decoder(
        "gemma3n_text",
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        sliding_window=8,
        layer_types=_PER_LAYER * 2,
        intermediate_size=[48] * 4,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        altup_num_inputs=2,
        laurel_rank=4,
    ),
    _decoder("phi", partial_rotary_factor=0.5),
    _decoder("phi3"),
    _decoder("gpt2"),
    _decoder("gpt2_eager", model_type="gpt2", attention="eager"),
    _decoder("gpt_bigcode"),
    _decoder("gpt_neo", attention_types=[[["global", "local"], 1]], window_size=8, num_layers=2, num_heads=4),
    _decoder("gpt_neox"),
    _decoder("gptj", rotary_dim=4),
    _decoder("codegen", rotary_dim=4),
    _decoder("opt", word_embed_proj_dim=32, ffn_dim=48),
    _decoder("bloom"),
    _decoder("falcon", head_dim=_ABSENT, new_decoder_architecture=True, num_kv_heads=2),
    _decoder("falcon_alibi", model_type="falcon", head_dim=_ABSENT, alibi=True),
    _decoder("mpt", max_seq_len=64, d_model=32, n_heads=4, n_layers=2, expansion_ratio=2),
    _decoder("stablelm"),
    _decoder("olmo"),
    _decoder("olmo2"),
    _decoder("olmo3", sliding_window=8, layer_types=_PER_LAYER),
    _decoder("cohere"),
    _decoder("cohere2", sliding_window=8, layer_types=_PER_LAYER),
    _decoder("starcoder2"),
    _decoder("granite"),
    _decoder("smollm3"),
    _decoder("nemotron"),
    _decoder("glm"),
    _decoder("glm4"),
    _decoder("helium"),
    _decoder("diffllama"),
    _decoder("exaone4", sliding_window=8, layer_types=_PER_LAYER),
    _decoder("persimmon"),
    _decoder("biogpt"),
    _decoder("xglm", d_model=32, ffn_dim=48, num_layers=2, attention_heads=4),
    _decoder("ctrl", n_embd=32, dff=48, n_layer=2, n_head=4),
    _moe("mixtral", sliding_window=None),
    _moe("mixtral_static", model_type="mixtral", sliding_window=None, cache="static"),
    _moe("qwen2_moe", shared_expert_intermediate_size=24),
    _moe("qwen3_moe"),
    _moe("deepseek_v2", **_DEEPSEEK),
    _moe("deepseek_v3", **_DEEPSEEK),
    _moe("olmoe"),
    _moe("phimoe"),
    _moe("gpt_oss", sliding_window=8, layer_types=_PER_LAYER),
    _moe("granitemoe"),
    _moe("jetmoe", kv_channels=8),
    _moe("minimax_m2"),
    _moe("ernie4_5_moe", moe_num_experts=4, moe_k=2, moe_layer_start_index=1),
    _moe("glm4_moe", **_DEEPSEEK),
    _moe(
        "dbrx",
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        ffn_config={"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    _moe("llama4_text", intermediate_size_mlp=48, attention_chunk_size=8),
    _linear("mamba", state_size=8, cache="own"),
    _linear("mamba2", state_size=8, num_heads=8, head_dim=8, n_groups=2, chunk_size=4, cache="own"),
    _linear("falcon_mamba", state_size=8, cache="own"),
    _linear("jamba", attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, use_mamba_kernels=False, **_EXPERTS),
    _linear("bamba", attn_layer_indices=[1], **_MAMBA2),
    _linear("falcon_h1", mamba_d_ssm=64, **_MAMBA2),
    _linear("granitemoehybrid", layer_types=["mamba", "attention"], shared_intermediate_size=48, **_EXPERTS, **_MAMBA2),
    _linear(
        "nemotron_h",
        num_hidden_layers=_ABSENT,
        layers_block_type=["mamba", "attention", "mlp"],
        ssm_state_size=8,
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=2,
        chunk_size=4,
    ),
    _linear(
        "zamba",
        num_hidden_layers=3,
        layers_block_type=["mamba", "hybrid", "hybrid"],
        mamba_d_state=8,
        attention_head_dim=16,
        head_dim=_ABSENT,
    ),
    _linear(
        "zamba2",
        layers_block_type=["mamba", "hybrid"],
        mamba_d_state=8,
        n_mamba_heads=8,
        mamba_ngroups=1,
        chunk_size=4,
        attention_head_dim=16,
        head_dim=_ABSENT,
        num_mem_blocks=1,
    ),
    _linear("rwkv", attention_hidden_size=32, context_length=64, cache="own"),
    _linear(
        "recurrent_gemma",
        lru_width=32,
        attention_window_size=8,
        block_types=["recurrent", "attention"],
        stateful=True,
        note="keeps its recurrent state in Python attributes of its modules",
    ),
    _linear("qwen3_next", **_GATED_DELTA, **_EXPERTS, shared_expert_intermediate_size=24),
    _linear("qwen3_5_text", **_GATED_DELTA),
    _linear("olmo_hybrid", **_GATED_DELTA),
    _linear("lfm2", layer_types=["conv", "full_attention"], block_ff_dim=48),
    _linear("minimax", layer_types=["linear_attention", "full_attention"], block_size=4, **_EXPERTS, cache="own"),
    _linear(
        "xlstm",
        hidden_size=64,
        num_heads=4,
        num_blocks=2,
        qk_dim_factor=1.0,
        chunkwise_kernel="chunkwise--native_autograd",
        cache="own",
    ),
    _encoder("bert"),
    _encoder("bert_eager", model_type="bert", attention="eager"),
    _encoder("bert_masked_lm", model_type="bert", auto="AutoModelForMaskedLM"),
    _encoder("roberta"),
    _encoder("distilbert"),
    _encoder("albert", embedding_size=16),
    _encoder("electra", embedding_size=16),
    _encoder(
        "deberta",
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        max_relative_positions=8,
    ),
    _encoder("deberta_v2", model_type="deberta-v2", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    _encoder("mpnet"),
    _encoder("longformer", attention_window=4),
    _encoder("modernbert", local_attention=4, global_attn_every_n_layers=2),
    _encoder("xlm_roberta", model_type="xlm-roberta"),
    _encoder("camembert"),
    _encoder("big_bird", attention_type="block_sparse", block_size=2, num_random_blocks=1, inputs=encoder_text(32)),
    _encoder(
        "funnel",
        auto="FunnelModel",
        num_hidden_layers=_ABSENT,
        block_sizes=[1, 1],
        d_model=32,
        n_head=4,
        d_head=8,
        d_inner=48,
    ),
    _encoder("roformer", embedding_size=16),
    _encoder("squeezebert", embedding_size=32),
    _encoder("convbert", embedding_size=16),
    _encoder(
        "fnet",
        inputs=lambda config: {"input_ids": _words(LENGTH)},
        bf16_failure="fft has no bfloat16",
    ),
    _encoder("esm", position_embedding_type="rotary", mask_token_id=5, token_dropout=True),
    _encoder("xlnet", max_position_embeddings=_ABSENT, d_model=32, n_layer=2, n_head=4, d_inner=48, inputs=text()),
    _encoder(
        "reformer",
        attn_layers=["local", "lsh"],
        axial_pos_shape=[4, 4],
        axial_pos_embds_dim=[16, 16],
        attention_head_size=8,
        num_buckets=4,
        local_attn_chunk_length=4,
        lsh_attn_chunk_length=4,
        inputs=encoder_text(16),
        hash_seed=0,
    ),
    _encoder("canine", num_hash_functions=4, num_hash_buckets=64, local_transformer_stride=4),
    _encoder("luke", entity_vocab_size=10),
    _encoder("layoutlm"),
    _encdec("t5", _T5),
    _encdec("t5_eager", _T5, model_type="t5", attention="eager"),
    _encdec("t5_static", _T5, model_type="t5", cache="static"),
    _encdec("mt5", _T5),
    _encdec("umt5", _T5),
    _encdec("longt5", _T5, local_radius=3),
    _encdec("switch_transformers", _T5, num_experts=4),
    _encdec("bart", _BART),
    _encdec("bart_static", _BART, model_type="bart", cache="static"),
    _encdec("mbart", _BART),
    _encdec("marian", _BART),
    _encdec("pegasus", _BART),
    _encdec("led", _BART, attention_window=4, max_encoder_position_embeddings=64),
    _encdec("blenderbot", _BART),
    _encdec("m2m_100", _BART),
    _encdec("plbart", _BART),
    _encdec("fsmt", _BART, langs=["a", "b"], src_vocab_size=VOCAB, tgt_vocab_size=VOCAB),
    _vision("vit"),
    _vision("vit_eager", model_type="vit", attention="eager"),
    _vision("vit_classifier", model_type="vit", auto="AutoModelForImageClassification"),
    _vision("deit"),
    _vision("swin", {}, image_size=PIXELS, patch_size=4, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4),
    _vision(
        "swinv2", {}, image_size=PIXELS, patch_size=4, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4
    ),
    _vision("convnext", {}, hidden_sizes=[16, 32], depths=[1, 1], num_stages=2),
    _vision("convnextv2", {}, hidden_sizes=[16, 32], depths=[1, 1], num_stages=2),
    _vision("beit", use_relative_position_bias=True),
    _vision("dinov2"),
    _vision("dinov2_other_size", model_type="dinov2", inputs=image(48), note="interpolates its position embedding"),
    _vision("dinov3_vit"),
    _vision(
        "segformer",
        hidden_sizes=[16, 32],
        depths=[1, 1],
        num_encoder_blocks=2,
        num_attention_heads=[2, 4],
        sr_ratios=[2, 1],
        patch_sizes=[7, 3],
        strides=[4, 2],
        mlp_ratios=[2, 2],
    ),
    _vision("resnet", {}, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1]),
    _vision("mobilenet_v2", {}, depth_multiplier=0.25),
    _vision("efficientnet", {}, width_coefficient=0.1, depth_coefficient=0.1, hidden_dim=128),
    _vision("mobilevit", hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32]),
    _vision("poolformer", {}, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1]),
    _vision("regnet", {}, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], groups_width=8),
    _vision("focalnet", embed_dim=16, depths=[1, 1], focal_levels=[1, 1], focal_windows=[3, 3]),
    _vision(
        "dpt",
        auto="AutoModelForDepthEstimation",
        num_hidden_layers=4,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
    ),
    _vision("yolos", num_detection_tokens=5, image_size=[32, 32]),
    _vision(
        "vit_mae",
        inputs=tensors(pixel_values=(BATCH, 3, PIXELS, PIXELS), noise=(BATCH, 16)),
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4,
    ),
    _vision(
        "detr",
        _BART,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        num_queries=5,
        backbone_config={
            "model_type": "resnet",
            "embedding_size": 16,
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "out_features": ["stage2"],
        },
    ),
    _vision("sam_vision_model", output_channels=16, num_pos_feats=16, global_attn_indexes=[1], window_size=2),
    _audio("wav2vec2", auto="AutoModelForCTC", vocab_size=VOCAB),
    _audio("wav2vec2_conformer", model_type="wav2vec2-conformer", position_embeddings_type="relative"),
    _audio("hubert"),
    _audio("wavlm"),
    _audio("sew", squeeze_factor=2),
    _audio("data2vec_audio", model_type="data2vec-audio"),
    _audio(
        "whisper",
        _TOKEN_IDS | _BART | {"num_mel_bins": 16, "max_source_positions": 16, "max_target_positions": 24},
        auto="AutoModelForSpeechSeq2Seq",
        inputs=spectrogram_to_text(16, 32),
        cache="dynamic",
    ),
    _audio(
        "whisper_static",
        _TOKEN_IDS | _BART | {"num_mel_bins": 16, "max_source_positions": 16, "max_target_positions": 24},
        model_type="whisper",
        auto="AutoModelForSpeechSeq2Seq",
        inputs=spectrogram_to_text(16, 32),
        cache="static",
    ),
    _audio(
        "audio_spectrogram_transformer",
        _TRANSFORMER | {"patch_size": 8, "num_mel_bins": 16, "max_length": 32, "frequency_stride": 8, "time_stride": 8},
        model_type="audio-spectrogram-transformer",
        inputs=tensors(input_values=(BATCH, 32, 16)),
    ),
    _audio("wav2vec2_bert", model_type="wav2vec2-bert", inputs=tensors(input_features=(BATCH, 16, 160))),
    _audio(
        "encodec",
        {},
        num_filters=4,
        hidden_size=16,
        codebook_size=16,
        codebook_dim=16,
        inputs=tensors(input_values=(BATCH, 1, 1280)),
    ),
    _audio(
        "speech_to_text",
        _TOKEN_IDS | _BART | {"input_feat_per_channel": 16, "max_source_positions": 64, "max_target_positions": 24},
        model_type="speech_to_text",
        auto="AutoModelForSpeechSeq2Seq",
        inputs=lambda config: (
            spectrogram_to_text(32, 16)(config) | {"attention_mask": torch.ones(BATCH, 32, dtype=torch.int64).tril(26)}
        ),
        conv_channels=32,
    ),
    _audio(
        "moonshine",
        _DECODER,
        auto="AutoModelForSpeechSeq2Seq",
        inputs=lambda config: waveform(2400)(config) | {"decoder_input_ids": _words(7)},
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        encoder_num_key_value_heads=4,
        decoder_num_key_value_heads=4,
        num_key_value_heads=4,
    ),
    _audio(
        "seamless_m4t_text",
        _TOKEN_IDS | _BART | _TRANSFORMER,
        model_type="seamless_m4t",
        auto="SeamlessM4TForTextToText",
        inputs=pair(),
        speech_encoder_layers=1,
        speech_encoder_attention_heads=4,
        speech_encoder_intermediate_size=48,
    ),
    _row(
        "patchtst",
        "series",
        {"auto": "AutoModel", "inputs": tensors(past_values=(BATCH, 16, 3))},
        {"d_model": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        {"num_input_channels": 3, "context_length": 16, "patch_length": 4, "patch_stride": 4},
    ),
    _row(
        "time_series_transformer",
        "series",
        {"auto": "AutoModel", "inputs": series(past=15, future=4)},
        _BART,
        {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2, 7], "num_time_features": 2},
    ),
    _row(
        "informer",
        "series",
        {"auto": "AutoModel", "inputs": series(past=15, future=4), "random": True, "note": "samples its keys"},
        _BART,
        {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2, 7], "num_time_features": 2},
    ),
    _multimodal(
        "clip",
        text_image(0, "right"),
        auto="AutoModel",
        text_config=_nested("clip_text_model", _ENCODER),
        vision_config=_nested("clip_vision_model", _TOWER),
        projection_dim=32,
    ),
    _multimodal(
        "siglip",
        text_image(0, "right"),
        auto="AutoModel",
        text_config=_nested("siglip_text_model", _ENCODER, projection_size=32),
        vision_config=_nested("siglip_vision_model", _TOWER),
    ),
    _multimodal(
        "chinese_clip",
        text_image(0, "right"),
        auto="AutoModel",
        text_config=_nested("chinese_clip_text_model", _ENCODER),
        vision_config=_nested("chinese_clip_vision_model", _TOWER),
        projection_dim=32,
    ),
    _multimodal(
        "blip",
        text_image(0, "right"),
        text_config=_nested("blip_text_model", _ENCODER, encoder_hidden_size=32, projection_dim=32),
        vision_config=_nested("blip_vision_model", _TOWER),
        projection_dim=32,
    ),
    _multimodal(
        "vilt",
        lambda config: (
            text_image(0, "right")(config)
            | {"token_type_ids": torch.zeros(BATCH, LENGTH, dtype=torch.int64)}
            | {"pixel_mask": torch.ones(BATCH, PIXELS, PIXELS, dtype=torch.int64)}
        ),
        auto="AutoModel",
        random=True,
        note="picks patches with multinomial",
        **_ENCODER | _VIT,
    ),
    _multimodal(
        "git",
        text_image(0, "right"),
        **_DECODER,
        vision_config=_nested("git_vision_model", _TOWER),
    ),
    _multimodal(
        "llava",
        text_image(4),
        cache="dynamic",
        text_config=_nested("llama"),
        vision_config=_nested("clip_vision_model", _TOWER),
        image_token_index=IMAGE,
    ),
    _multimodal(
        "llava_next",
        lambda config: (
            text_image(10, pixels=(BATCH, 2, 3, PIXELS, PIXELS))(config)
            | {"image_sizes": torch.full((BATCH, 2), PIXELS)}
        ),
        text_config=_nested("llama"),
        vision_config=_nested("clip_vision_model", _TOWER),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[PIXELS, PIXELS]],
    ),
    _multimodal(
        "paligemma",
        text_image(4),
        text_config=_nested("gemma"),
        vision_config=_nested("siglip_vision_model", _TOWER),
        image_token_index=IMAGE,
        projection_dim=32,
    ),
    _multimodal(
        "gemma3",
        lambda config: (made := text_image(4)(config)) | {"token_type_ids": (made["input_ids"] == IMAGE).long()},
        text_config=_nested("gemma3_text", sliding_window=8, layer_types=_PER_LAYER),
        vision_config=_nested("siglip_vision_model", _TOWER),
        image_token_index=IMAGE,
        mm_tokens_per_image=4,
    ),
    _multimodal(
        "internvl",
        text_image(4),
        text_config=_nested("qwen2"),
        vision_config=_nested("internvl_vision", _VIT, image_size=[32, 32], patch_size=[8, 8]),
        image_token_id=IMAGE,
    ),
    _multimodal(
        "idefics3",
        text_image(4, pixels=(BATCH, 1, 3, PIXELS, PIXELS)),
        text_config=_nested("llama"),
        vision_config=_nested("idefics3_vision", _VIT),
        image_token_id=IMAGE,
        scale_factor=2,
    ),
    _multimodal(
        "smolvlm",
        text_image(4, pixels=(BATCH, 1, 3, PIXELS, PIXELS)),
        text_config=_nested("llama"),
        vision_config=_nested("smolvlm_vision", _VIT),
        image_token_id=IMAGE,
        scale_factor=2,
    ),
    _multimodal(
        "kosmos2",
        lambda config: (
            (made := text_image(4)(config)) | {"image_embeds_position_mask": (made["input_ids"] == IMAGE).long()}
        ),
        model_type="kosmos-2",
        text_config=_TOKEN_IDS | {"embed_dim": 32, "layers": 2, "ffn_dim": 48, "attention_heads": 4},
        vision_config=dict(_TOWER),
        latent_query_num=4,
    ),
    _multimodal(
        "owlvit",
        text_image(0, "right"),
        auto="AutoModel",
        text_config=_nested("owlvit_text_model", _ENCODER),
        vision_config=_nested("owlvit_vision_model", _TOWER),
        projection_dim=32,
    ),
    _multimodal(
        "layoutlmv3",
        lambda config: (
            text_image(0, "right")(config) | {"bbox": torch.tensor([1, 2, 30, 40]).expand(BATCH, LENGTH, 4).clone()}
        ),
        auto="AutoModel",
        **_ENCODER
        | _VIT
        | {"input_size": PIXELS, "coordinate_size": 6, "shape_size": 4, "max_2d_position_embeddings": 64},
    ),
    _multimodal(
        "mllama",
        lambda config: (
            text_image(0, pixels=(BATCH, 1, 2, 3, 28, 28))(config)
            | {
                "aspect_ratio_ids": torch.tensor([[1], [2]]),
                "aspect_ratio_mask": torch.tensor([[[1, 0]], [[1, 1]]]),
                "cross_attention_mask": torch.tensor([[[1, 0]], [[1, 1]]])[:, None].repeat(1, LENGTH, 1, 1),
            }
        ),
        cache="dynamic",
        text_config=_nested("mllama_text_model", cross_attention_layers=[1], num_hidden_layers=3),
        vision_config=_nested(
            "mllama_vision_model",
            _TRANSFORMER,
            image_size=28,
            patch_size=14,
            num_global_layers=1,
            attention_heads=4,
            max_num_tiles=2,
            intermediate_layers_indices=[0],
            vision_output_dim=64,
            supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
        ),
    ),
    _multimodal(
        "qwen2_vl",
        qwen_image(),
        cache="dynamic",
        text_config=_nested("qwen2_vl_text", rope_parameters=_MROPE),
        vision_config=_QWEN_VISION,
        image_token_id=IMAGE,
        vision_start_token_id=7,
        vision_end_token_id=8,
        video_token_id=10,
    ),
    _multimodal(
        "qwen2_5_vl",
        qwen_image(),
        text_config=_nested("qwen2_5_vl_text", rope_parameters=_MROPE),
        vision_config=_QWEN_VISION | {"out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 8},
        image_token_id=IMAGE,
        vision_start_token_id=7,
        vision_end_token_id=8,
        video_token_id=10,
    ),
    _multimodal(
        "qwen3_vl",
        qwen_image(),
        text_config=_nested("qwen3_vl_text", rope_parameters=_MROPE),
        vision_config=_QWEN_VISION
        | {"out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        image_token_id=IMAGE,
        vision_start_token_id=7,
        vision_end_token_id=8,
        video_token_id=10,
    ),
)

BY_NAME: Mapping[str, Entry] = {entry.name: entry for entry in CORPUS}
