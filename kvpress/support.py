"""Which models this cache serves, and why it refuses the others."""

from __future__ import annotations

from transformers import PreTrainedConfig

from kvpress.errors import UnsupportedModelError

_OWN_CACHE = {"minimax", "deepseek_v4", "unlimited_ocr", "doge"}  # caches with a meaning of their own
_INDEXED = {  # sparse attention with an index of its own keys
    "axk2",
    "deepseek_v32",
    "dots3_note",
    "glm5_next",
    "glm_moe_dsa",
    "hy_v4",
    "minimax_m3_vl",
    "mistral_large4",
    "qwen4_exp",
}
_LOOPED = {"dory", "hrm_text", "inkling2_loop", "inkling2_loop_text"}  # several caches to a layer
_ATTENDING_TWICE = {"diffllama"}
_DECODERS_ALL_THE_SAME = {"gpt_neox", "gpt_neox_japanese"}  # their configurations say is_decoder=False
_ALIBI = {"bloom", "mpt"}
_LATENT_FIELDS = ("kv_lora_rank",)
_EXPANDING = {"jetmoe"}


def check_config(config: PreTrainedConfig) -> None:
    """Refuse models that would be silently wrong.

    Raises:
        UnsupportedModelError: naming the model type and the reason.
    """
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"model type {kind!r} is an encoder-decoder; PolicyCache serves decoder-only models"
        )
    if getattr(config, "is_decoder", True) is False and kind not in _DECODERS_ALL_THE_SAME:
        raise UnsupportedModelError(
            f"is_decoder of the model's configuration must be True, got False: {kind!r} looks ahead"
        )
    if kind in _ALIBI or getattr(config, "alibi", False):
        raise UnsupportedModelError(
            f"model type {kind!r} biases scores by distance (ALiBi), counted in cache slots: an evicting cache would be wrong"
        )
    layer_types = getattr(config, "layer_types", None) or []
    if kind in _INDEXED or "indexed_attention" in layer_types:
        raise UnsupportedModelError(
            f"model type {kind!r} selects tokens with an index of its own (DSA); it needs its own cache"
        )
    if kind in _LOOPED:
        raise UnsupportedModelError(
            f"model type {kind!r} runs a layer several times, each with keys of its own, in layers that it adds to the cache"
        )
    if kind in _ATTENDING_TWICE:
        raise UnsupportedModelError(
            f"model type {kind!r} attends twice to a layer's keys, and tokens are evicted after the first time"
        )
    if kind in _OWN_CACHE:
        raise UnsupportedModelError(f"model type {kind!r} needs its own cache class")
    if getattr(config, "use_cache", True) is False:
        raise UnsupportedModelError(f"use_cache of the model's configuration must be True, got False ({kind!r})")
    if getattr(config, "is_causal", True) is False:
        raise UnsupportedModelError(f"is_causal of the model's configuration must be True, got False ({kind!r})")


def expands_keys(config: PreTrainedConfig) -> bool:
    """Whether the model makes other keys of the cached ones before it attends."""
    return config.model_type in _EXPANDING or any(getattr(config, field, None) for field in _LATENT_FIELDS)
