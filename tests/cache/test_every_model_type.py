"""Every causal language model of the installed transformers: served as its own cache serves it, or refused by name.

Families that the other tests walk are chosen by hand; this finds those that a new release of transformers brings or changes. Models are
built tiny from their configuration, with the fields that most have; what cannot be built so is skipped. All of them with
`KVPRESS_TEST_EVERYTHING=1` (three minutes), else a few that differ from the rest.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from policy_table import EVERYTHING
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvpress import PolicyCache
from kvpress.cache_argument import passed
from kvpress.errors import UnsupportedModelError
from kvpress.testing.families import random_tokens

ALL = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
SERVED = (
    "cohere2",
    "cwm",
    "glm4_moe_lite",
    "jetmoe",
    "laguna",
    "longcat_flash",
    "nanochat",
    "olmo3",
    "qwen2_moe",
)
REFUSED = ("bert", "diffllama", "xglm")
LARGEST = 20_000_000  # parameters
PROMPT, TEXT = 30, 36
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "moe_ffn_hidden_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "sliding_window"), 16),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 256),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    "vocab_size": 97, "num_key_value_heads": 2, "rotary_dim": 4, "num_experts_per_tok": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LEFT_OUT: tuple[dict[str, int | None], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"head_dim": None},
    {"num_key_value_heads": 4, "head_dim": None},
)


def built(kind: str) -> tuple[PreTrainedModel, torch.Tensor] | None:
    """A tiny model and its logits under `DynamicCache`, or `None` where these sizes do not make one."""
    config_class: Any = CONFIG_MAPPING[kind]
    known = {*inspect.signature(config_class.__init__).parameters, *getattr(config_class, "__dataclass_fields__", {})}
    for changes in LEFT_OUT:
        sizes = {name: size for name, size in {**SIZES, **changes}.items() if name in known and size is not None}
        try:
            config = config_class(**sizes)
            with torch.device("meta"):
                size = sum(each.numel() for each in AutoModelForCausalLM.from_config(config).parameters())
            if size > LARGEST:
                return None
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).eval()
            return model, logits(model, DynamicCache(config=text_config(config)))
        except Exception:  # whatever a configuration says to sizes that are not its own
            continue
    return None


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    return config.get_text_config(decoder=True)


def logits(model: PreTrainedModel, cache: Any) -> torch.Tensor:
    """Of the last token of the prompt and of those fed one by one after it."""
    text = random_tokens(1, TEXT)
    with torch.no_grad():
        found = [
            model(piece, **passed(model, cache), use_cache=True).logits[:, -1]
            for piece in (text[:, :PROMPT], *text[:, PROMPT:].split(1, dim=1))
        ]
    return torch.cat(found)


def served(kind: str) -> bool | None:
    """Whether a model of this type equals its own cache; `None` where it is not built or refused."""
    made = built(kind)
    if made is None:
        return None
    model, expected = made
    try:
        found = logits(model, PolicyCache(model, "full"))
    except UnsupportedModelError as error:
        assert kind.split("_")[0] in str(error).lower() or "mask" in str(error)  # it says what it refuses
        return None
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    evicting = PolicyCache(model, "snapkv", budget=16, window=4)
    assert not torch.allclose(logits(model, evicting), expected, atol=1e-6)
    assert all(layer.table.kept_positions().shape[-1] <= 16 for layer in evicting.policy_layers)
    return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ALL if EVERYTHING else [kind for kind in (*SERVED, *REFUSED) if kind in ALL])
def test_a_model_is_served_or_refused_by_name(kind):
    found = served(kind)
    if kind in (*SERVED, *REFUSED):
        assert found is (kind in SERVED or None)
    elif found is None:
        pytest.skip("not built by these sizes, or refused")
