"""Choosing slots, interpreted: as the reference, number for number."""

from __future__ import annotations

import pytest
import torch

from kvpress.kernels.choosing import best_slots, listed_slots, reused_slots


@pytest.mark.parametrize("shape", [(1, 1, 50), (2, 3, 65), (4, 1030)], ids=str)
def test_best_slots_and_ties(generator, shape):
    scores = torch.randint(-4, 4, shape, generator=generator).float()
    scores[..., 3] = -0.0
    for count in (1, 7, 49, 2000):
        found, wanted = (best_slots(scores, count, impl=impl) for impl in ("triton", "reference"))
        assert torch.equal(found, wanted) and found.shape[-1] == min(count, shape[-1])


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(("sinks", "local"), [(0, 1), (4, 0), (3, 1200)])
def test_lists_of_slots(generator, heads, sinks, local):
    chosen = torch.randint(5, 900, (2, heads, 9), generator=generator)
    found, wanted = (
        listed_slots(chosen, sinks=sinks, local=local, slots=3000, impl=impl) for impl in ("triton", "reference")
    )
    assert torch.equal(found, wanted)
    strided = chosen.repeat_interleave(2, -1)[..., ::2]
    assert torch.equal(listed_slots(strided, sinks=sinks, local=local, slots=3000, impl="triton"), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_selection_is_used_again_for_a_query_close_by(generator, dtype):
    former = torch.randn(2, 6 * 80, generator=generator).to(dtype)
    query = (
        (former.float() + 0.3 * torch.randn(2, 480, generator=generator)).to(dtype).view(2, 1, 6, 80).transpose(1, 2)
    )
    live, chosen = torch.tensor([True, True]), torch.randint(4, 90, (2, 1, 5), generator=generator)
    cosine = torch.nn.functional.cosine_similarity(query.flatten(1).double(), former.double())
    options = {"sinks": 2, "local": 3, "slots": 100}
    for threshold, again in ((float(cosine.min()) - 1e-12, True), (float(cosine.min()) + 1e-12, False), (-1.0, True)):
        for impl in ("triton", "reference"):
            found = reused_slots(query, former, live, chosen, threshold=threshold, impl=impl, **options)
            assert (found is not None) == again, (threshold, impl)
            assert found is None or torch.equal(found, listed_slots(chosen, impl="reference", **options))
    same = former.view(2, 6, 1, 80)
    assert reused_slots(same, former, live, chosen, threshold=1 - 1e-12, impl="triton", **options) is not None
    assert reused_slots(same, former, ~live, chosen, threshold=-1.0, impl="triton", **options) is None
    assert reused_slots(same * 0, former, live, chosen, threshold=0.1, impl="triton", **options) is None
