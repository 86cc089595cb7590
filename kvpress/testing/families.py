"""Tiny random models of every family that the cache serves, built from a configuration: no download, a few milliseconds a forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCABULARY = 97
_MIXED = ["full_attention", "sliding_attention", "full_attention"]


def _common(layers: int = 2) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,  # peaked attention: with the usual 0.02 it is all but uniform, and a wrong kept set would not show
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def _experts() -> dict[str, Any]:
    return {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**_common()),
    "qwen2": lambda: transformers.Qwen2Config(**_common()),
    "qwen3": lambda: transformers.Qwen3Config(**_common(), head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**_common(), sliding_window=None),
    "phi3": lambda: transformers.Phi3Config(**_common()),
    "gemma2": lambda: transformers.Gemma2Config(
        **_common(3),
        head_dim=8,
        sliding_window=16,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=5.0,
        layer_types=_MIXED,
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_common(3), head_dim=8, sliding_window=16, layer_types=_MIXED),
    "olmo3": lambda: transformers.Olmo3Config(**_common(3), sliding_window=16, layer_types=_MIXED),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**_common(), **_experts(), shared_expert_intermediate_size=16),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        **{key: value for key, value in _common().items() if key != "num_key_value_heads"}
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**{**_common(), **_experts(), "head_dim": 8}),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_common(3), head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=16, layer_types=_MIXED
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**_common(), "num_key_value_heads": 4},
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
    ),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **_common(3),
        **_experts(),
        layer_types=["linear_attention", "full_attention", "full_attention"],
        head_dim=8,
        shared_expert_intermediate_size=16,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
}
FAMILIES = tuple(_CONFIGS)


def tiny_config(family: str) -> PreTrainedConfig:
    """The configuration of a tiny model of `family` (one of `FAMILIES`).

    Raises:
        ValueError: an unknown family.
    """
    if family not in _CONFIGS:
        raise ValueError(f"family must be one of {list(FAMILIES)}, got {family!r}")
    return _CONFIGS[family]()


def tiny_model(
    family: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A random model of `family` in evaluation mode, the same for the same `seed`.

    Args:
        family: one of `FAMILIES`.
        dtype: of the weights. Weights are drawn in fp32 and then cast, so models of two types hold the same numbers.
        seed: of the weights. The caller's random state is left as it was.
        changes: fields of the configuration to set, such as `num_hidden_layers=3`.

    Raises:
        ValueError: an unknown family.
    """
    config = tiny_config(family)
    if changes:
        config = type(config)(**{**config.to_dict(), **changes})
    return model_from(config, dtype=dtype, seed=seed)


def model_from(config: PreTrainedConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A random model of any configuration, as `tiny_model` makes it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "sinks")):  # initialised to 0, where a bug in their use would not show
                torch.nn.init.normal_(parameter, std=0.3)
            elif "norm" in name:  # all alike, keys of a model that normalises them would have equal norms
                parameter.data += 0.2 * torch.randn_like(parameter)
    model.generation_config.eos_token_id = None  # a random model would end wherever it meets it
    model.generation_config.pad_token_id = 0
    made: PreTrainedModel = model.to(torch.empty(0).device, dtype).eval()  # where tensors are made by default
    if dtype == torch.float64:
        made.set_experts_implementation("eager")  # grouped products of experts have no fp64
    return made


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Token ids without the special ones: int64 of `shape`, the same for the same `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, shape, generator=generator)
