"""With room for every candidate, each selection policy gives what a full cache gives, in every way of generating."""

from functools import cache as remembered

import pytest
import torch
from transformers import DynamicCache

from kvpress import PolicyCache
from kvpress.policies import Quest, TidalDecode, TokenSelect
from kvpress.testing.families import FAMILIES, tiny_model
from kvpress.testing.generation import WAYS, Outcome

# a prompt of 24 tokens: TokenSelect selects from 13 tokens on, all candidates
ROOMY = {
    "tokenselect keep": TokenSelect(top_k=64, sinks=2, local=4, chunk=4, tail=3, positions="keep"),
    "tokenselect reindex": TokenSelect(top_k=64, sinks=2, local=4, chunk=4, tail=3),
    "tokenselect int8 keep": TokenSelect(top_k=64, sinks=2, local=4, chunk=4, tail=3, positions="keep", index="int8"),
    "tokenselect int8 reindex": TokenSelect(top_k=64, sinks=2, local=4, chunk=4, tail=3, index="int8"),
    "tokenselect int4 reindex": TokenSelect(top_k=64, sinks=2, local=4, chunk=4, tail=3, index="int4"),
    "quest": Quest(top_k=96, page_size=4, skip_layers=0),
    "tidaldecode": TidalDecode(top_k=96, dense_layers=0),
}
SIDES = {"llama": tuple(WAYS), "default": ("padded_batch", "beams", "turns")}


@remembered
def stock(family: str, way: str) -> Outcome:
    return WAYS[way](tiny_model(family), lambda model: DynamicCache(config=model.config))


def cases():
    for number, family in enumerate(FAMILIES):
        for place, name in enumerate(ROOMY):
            if family == "deepseek_v3" and name.endswith("reindex"):
                continue  # refused: its cached keys are latents
            if family == "llama":
                yield from ((name, family, way) for way in WAYS)
            else:
                yield name, family, SIDES["default"][(number + place) % 3]


@pytest.mark.parametrize(("name", "family", "way"), list(cases()))
def test_equals_a_full_cache(name, family, way):
    outcome = WAYS[way](tiny_model(family), lambda model: PolicyCache(model, ROOMY[name]))
    assert outcome.error(stock(family, way)) <= 1e-5
    layer = outcome.cache.policy_layers[-1].layer_idx
    assert outcome.cache.selected_positions(layer).shape[-1] > 20


@pytest.mark.parametrize("positions", ["keep", "reindex"])
def test_every_candidate_chosen_equals_full_while_selection_runs(feed, llama, positions):
    """The selection really runs, since slots exceed the room by the padding, and chooses all."""
    ids = torch.arange(3, 3 + 2 * 40).view(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :12] = 0
    policy = TokenSelect(top_k=18, sinks=2, local=8, chunk=4, tail=2, threshold=2, positions=positions)
    fed = feed(llama, PolicyCache(llama, policy), ids, (24, 1, 1, 1, 1), mask)
    full = feed(
        llama,
        PolicyCache(llama, TokenSelect(top_k=99, local=8, chunk=4, positions="keep")),
        ids,
        (24, 1, 1, 1, 1),
        mask,
    )
    assert max(float((a - b).abs().max()) for a, b in zip(fed.logits[:1], full.logits[:1], strict=True)) < 1e-9
    assert fed.cache.report().selections == 0
    fed = feed(llama, PolicyCache(llama, policy), ids, (24, 1, 1, 1, 1, 1), mask)
    assert fed.cache.report().selections == 2
    full = feed(
        llama,
        PolicyCache(llama, TokenSelect(top_k=99, local=8, chunk=4, positions="keep")),
        ids,
        (24, 1, 1, 1, 1, 1),
        mask,
    )
    assert float((fed.logits[0] - full.logits[0]).abs().max()) < 1e-9


@pytest.mark.parametrize("name", ROOMY)
def test_batch_rows_equal_each_alone_when_sets_are_narrow(feed, name):
    llama = tiny_model("llama", dtype=torch.float64, num_hidden_layers=4)  # TidalDecode: two layers choose, two follow
    narrow = {
        "tokenselect keep": TokenSelect(top_k=5, sinks=2, local=6, chunk=6, tail=2, positions="keep", threshold=0.1),
        "tokenselect reindex": TokenSelect(top_k=5, sinks=2, local=6, chunk=6, tail=2, threshold=0.1),
        "tokenselect int8 keep": TokenSelect(
            top_k=5, sinks=2, local=6, chunk=6, tail=2, positions="keep", threshold=0.1, index="int8"
        ),
        "tokenselect int8 reindex": TokenSelect(
            top_k=5, sinks=2, local=6, chunk=6, tail=2, threshold=0.1, index="int8"
        ),
        "tokenselect int4 reindex": TokenSelect(
            top_k=5, sinks=2, local=6, chunk=6, tail=2, threshold=0.1, index="int4"
        ),
        "quest": Quest(top_k=8, page_size=4, skip_layers=0),
        "tidaldecode": TidalDecode(top_k=8, dense_layers=0),
    }[name]
    ids = torch.arange(3, 3 + 2 * 45).view(2, 45)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    sizes = (30, *[1] * 6, 3, *[1] * 6)
    together = feed(llama, PolicyCache(llama, narrow), ids, sizes, mask)
    alone = feed(llama, PolicyCache(llama, narrow), ids[1:, 11:], (19, *sizes[1:]))
    assert float((together.logits[1] - alone.logits[0]).abs().max()) < 1e-9
    full = feed(llama, PolicyCache(llama, ROOMY["tokenselect keep"]), ids, sizes, mask)
    assert float((together.logits[1] - full.logits[1]).abs().max()) > 1e-3, "nothing was left out"
