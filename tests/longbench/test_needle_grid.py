"""The grid covers every length and depth, and the needle lies where its cell says."""

import pytest

from kvpress.longbench.needle import needle_samples
from kvpress.longbench.ruler.haystack import NOISE


@pytest.mark.parametrize("haystack", ["essay", "noise"])
def test_every_cell_holds_its_needle_at_its_depth(haystack, encoder):
    lengths, depths = (1000, 1500), (0, 25, 50, 100)
    samples = needle_samples(lengths, depths, 2, encoder, haystack=haystack)
    cells = [tuple(sample.details["cell"]) for sample in samples]
    assert sorted(set(cells)) == sorted((length, depth) for length in lengths for depth in depths)
    assert len(cells) == len({sample.sample_id for sample in samples}) == 16
    for sample in samples:
        length, depth = sample.details["cell"]
        (needle,) = sample.details["needles"]
        body = sample.context.partition("afterwards.\n")[2]
        share = body.index(needle) / (len(body) - len(needle))
        step = 100 * max(len(NOISE), 130) / len(body)  # one line, or one long sentence
        assert abs(100 * share - depth) <= step
        assert 0.8 * length < encoder.length(sample) + sample.max_new_tokens <= length
        assert sample.groups == (f"{length}/{depth:g}%", f"average/{length}")


def test_bad_arguments(encoder):
    with pytest.raises(ValueError, match="depth must lie between 0 and 100 percent, not 101"):
        needle_samples([1000], [101], 1, encoder)
    with pytest.raises(ValueError, match="haystack must be"):
        needle_samples([1000], [1], 1, encoder, haystack="needle")
