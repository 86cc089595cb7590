"""What one process and two do alike: a model whose KV heads they share, and the policies that decide over them."""

import torch

from kvpress import PolicyCache
from kvpress.policies.quest import Quest
from kvpress.policies.registry import make_policy
from kvpress.policies.tidaldecode import TidalDecode
from kvpress.policies.tokenselect import TokenSelect
from kvpress.testing.families import random_tokens, tiny_model

LAYERS, KV_HEADS, NEW = 4, 4, 5
VOTES = {"top_k": 5, "sinks": 1, "local": 4, "chunk": 4, "tail": 2}
CASES = {
    "full": "full",
    "streaming_llm": make_policy("streaming_llm", budget=10, sinks=2),
    "streaming_llm, re-indexed": make_policy("streaming_llm", budget=10, sinks=2, positions="reindex"),
    "sepllm": make_policy("sepllm", initial=1, separators=2, window=4, capacity=12, token_ids=tuple(range(5, 97, 6))),
    "snapkv": make_policy("snapkv", budget=10, window=4, kernel_size=3),
    "pyramidkv": make_policy("pyramidkv", budget=12, window=4, kernel_size=3, beta=4),
    "h2o": make_policy("h2o", budget=10),
    "h2o, a budget a head": make_policy("h2o", budget=((6, 8, 10, 12),) * LAYERS),
    "h2o, bytes": make_policy("h2o", budget="20KB"),
    "random": make_policy("random", budget=10, seed=3),
    "morphkv": make_policy("morphkv", budget=10, window=4),
    "keyformer": make_policy("keyformer", budget=10, steps=8),
    "adakv": make_policy("adakv", budget=10, window=4, kernel_size=3),
    "adakv, bytes": make_policy("adakv", budget="24KB", window=4, kernel_size=3),
    "tova": make_policy("tova", budget=10),
    "tokenselect": TokenSelect(**VOTES, positions="keep", threshold=0.0),
    "tokenselect, re-indexed": TokenSelect(**VOTES),
    "tova + tokenselect": [make_policy("tova", budget=16), TokenSelect(**VOTES, positions="keep", threshold=0.0)],
    "quest": Quest(top_k=8, page_size=4, skip_layers=1),
    "tidaldecode": TidalDecode(top_k=6, dense_layers=1, reselect_layer=3),
}
TOGETHER = ("adakv", "tova", "tokenselect")  # decided over all heads


def whole_model():
    """In fp64, so that sums over heads in another order choose the same tokens."""
    return tiny_model(
        "llama",
        dtype=torch.float64,
        num_hidden_layers=LAYERS,
        num_attention_heads=2 * KV_HEADS,
        num_key_value_heads=KV_HEADS,
        hidden_size=64,
    )


def outcome(model, policy):
    """Tokens of two turns of a padded batch, and what each layer kept and selected then."""
    ids, mask = random_tokens(2, 24), torch.ones(2, 24, dtype=torch.long)
    ids[0, :5] = mask[0, :5] = 0
    cache = PolicyCache(model, policy)
    found = {}
    for turn in ("first", "second"):
        ids = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
        found[turn] = ids.tolist()
        found[f"{turn} kept"] = [cache.kept_positions(layer).tolist() for layer in range(LAYERS)]
        if cache.policies.selection is not None:
            found[f"{turn} selected"] = [cache.selected_positions(layer).tolist() for layer in range(LAYERS)]
            found[f"{turn} hits"] = [layer.selector.hits for layer in cache.policy_layers]
        ids = torch.cat([ids, random_tokens(2, 6, seed=1)], dim=1)
        mask = torch.cat([mask, torch.ones(2, ids.shape[1] - mask.shape[1], dtype=torch.long)], dim=1)
    found["heads"] = cache.policy_layers[0].table.positions.shape[1]
    return found
