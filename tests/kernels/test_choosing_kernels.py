"""Choosing slots and pages, reusing a selection, attention to turned keys: every implementation against what is written out here."""

import math

import numpy
import pytest
import torch

from kvpress.kernels.attention.turned import attend_turned
from kvpress.kernels.choosing import best_slots, largest_products, listed_slots, reused_slots
from kvpress.kernels.pages import bounds_type, choose_pages, page_bounds, page_scores, page_slots
from kvpress.row_format import row_format
from kvpress.testing.slots_oracle import assert_within_budget, oracle, rejected

BOTH = ["native", "reference"]


def made(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ranked(row, count):
    """The `count` best entries of a list, the later of equal ones, ascending."""
    return sorted(sorted(range(len(row)), key=lambda entry: (row[entry], entry))[-count:])


SCORES = {
    "random": lambda *shape: made(*shape, seed=1),
    "few values": lambda *shape: made(*shape, seed=2).mul(2).round(),
    "both zeros": lambda *shape: made(*shape, seed=3).sign().mul(0.0),
    "mostly nothing": lambda *shape: made(*shape, seed=4).masked_fill(made(*shape, seed=5) < 1, -torch.inf),
    "close together": lambda *shape: 1 + made(*shape, seed=6) * 1e-6,
    "votes": lambda *shape: (made(*shape, seed=7) * 6).softmax(-1),
}
LONG = {  # rows of which a sample is taken first, and those on which a sample misleads
    "random": lambda size: made(size, seed=8),
    "votes": lambda size: (made(size, seed=9) * 6).softmax(-1),
    "all equal": lambda size: torch.full((size,), 0.25),
    "two values": lambda size: (made(size, seed=10) > 1).float(),
    "many ties at the least": lambda size: made(size, seed=11).mul(8).round(),
    "rising": lambda size: torch.arange(size).float(),
    "falling": lambda size: torch.arange(size).flip(0).float(),
    "denormal": lambda size: made(size, seed=12) * 1e-41,
    "both zeros": lambda size: made(size, seed=13).sign().mul(0.0),
    "infinities": lambda size: made(size, seed=14).div(0.0).where(made(size, seed=15) > 1.5, made(size, seed=16)),
    "mostly nothing": lambda size: made(size, seed=17).masked_fill(made(size, seed=18) < 2, -torch.inf),
    "only the sample is high": lambda size: made(size).index_add(
        0, torch.arange(1024) * size // 1024, torch.full((1024,), 9.0)
    ),
    "only the sample is low": lambda size: made(size).index_fill(0, torch.arange(1024) * size // 1024, -9.0),
}


@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize(
    "shape, count", [((7,), 3), ((2, 3, 65), 64), ((2, 1000), 1), ((3, 4097), 640), ((2, 2, 5), 9)]
)
def test_the_best_slots_are_the_last_of_a_sorted_list(level, poisoned, impl, kind, shape, count):
    scores = SCORES[kind](*shape)
    best = best_slots(scores, count, impl=impl)
    rows = scores.reshape(-1, shape[-1]).tolist()
    assert best.dtype == torch.int64
    assert best.reshape(len(rows), -1).tolist() == [ranked(row, count) for row in rows]
    strided = torch.stack([scores, -scores], dim=-1)[..., 0]
    assert torch.equal(best_slots(strided, count, impl=impl), best)


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("size", [4095, 4096, 5000, 32769, 70000])
def test_the_best_slots_of_long_rows(poisoned, kind, size):
    row = LONG[kind](size)
    order = numpy.argsort(row.numpy(), kind="stable")  # of equal ones the later comes last
    for count in (1, 2, 60, 640, size // 8, size // 3, size - 1, size):
        best = best_slots(row, count, impl="native").numpy()
        assert numpy.array_equal(best, numpy.sort(order[-count:]))
    apart = torch.stack([row, -row])[:, : size - 3]  # rows that do not lie side by side
    assert numpy.array_equal(
        best_slots(apart, 640, impl="native")[0], best_slots(row[: size - 3].clone(), 640, impl="reference")
    )


def test_what_cannot_be_chosen_is_refused():
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        best_slots(made(4), 0)
    with pytest.raises(ValueError, match="fp32 scores, not"):
        best_slots(made(4).double(), 1, impl="native")
    assert best_slots(made(4).double(), 1).shape == (1,)
    with pytest.raises(ValueError, match="a single row to choose, got 2"):
        largest_products(made(1, 2, 2, 8), made(1, 2, 5, 8))
    with pytest.raises(ValueError, match="sinks and local must fit into 5 slots, got 3 and 3"):
        listed_slots(torch.zeros(1, 1, 1, dtype=torch.long), sinks=3, local=3, slots=5)
    with pytest.raises(ValueError, match="former"):
        reused_slots(
            made(1, 2, 1, 8), made(1, 8), torch.ones(1).bool(), torch.zeros(1, 1, 1).long(),
            threshold=0.5, sinks=0, local=0, slots=4,
        )  # fmt: skip


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("kind", [None, "bfloat16", "float16", "int8"])
def test_the_largest_products(level, poisoned, group, dim, kind):
    form = row_format(kind)
    query, plain = made(2, 2 * group, 1, dim), made(2, 2, 1100, dim, seed=1)
    keys, scale = form.parts(form.pack(plain))
    positions = torch.arange(1100, dtype=torch.int32).expand(2, 1, -1).clone()
    positions[1, :, ::5] = -1
    exact = keys.double() if scale is None else keys.double() * scale.double()[..., None]
    exact = (query.double().view(2, 2, group, dim) @ exact.transpose(-1, -2)).amax(dim=2)
    low = largest_products(query, keys, keys_scale=scale, impl="reference")
    assert_within_budget(low, low, exact)
    found = largest_products(query, keys, keys_scale=scale, impl="native")
    assert_within_budget(found, low, exact)
    masked = exact.masked_fill(positions < 0, -torch.inf)
    for impl in BOTH:
        found = largest_products(query, keys, positions=positions, keys_scale=scale, impl=impl)
        assert_within_budget(found, low.masked_fill(positions < 0, -torch.inf), masked)
        assert rejected(assert_within_budget, found.roll(1, dims=1), low, masked)


@pytest.mark.parametrize("impl", BOTH)
def test_a_product_that_is_no_number_is_never_chosen(level, impl):
    query, keys = made(1, 6, 1, 80), made(1, 2, 70, 80, seed=1)
    keys[0, 0, 3, 70] = torch.nan
    keys[0, 1, 69, 0] = torch.inf
    query[0, 3:, 0, 0] = torch.tensor([1.0, 0.0, -1.0])
    products = largest_products(query, keys, impl=impl)
    assert products[0, 0, 3] == products[0, 1, 69] == -torch.inf
    assert products.isfinite().sum() == 138


@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lists", [1, 3])
def test_a_selection_serves_again_while_the_query_has_hardly_turned(poisoned, impl, dtype, lists):
    query, former = made(2, 6, 1, 20).to(dtype), made(2, 120, seed=1).to(dtype)
    former = former * 0.5 + query.flatten(1)
    chosen = torch.arange(4, 9).expand(2, lists, -1) + torch.arange(2)[:, None, None]
    chosen = chosen.contiguous()
    cosines = torch.nn.functional.cosine_similarity(query.flatten(1).double(), former.double()).tolist()
    expected = torch.cat(
        [torch.arange(3).expand(2, lists, 3), chosen, torch.arange(36, 40).expand(2, lists, 4)], dim=-1
    )
    ends = {"sinks": 3, "local": 4, "slots": 40}
    both = torch.ones(2, dtype=torch.bool)
    for layout in (query, query.transpose(1, 2).contiguous().transpose(1, 2)):
        found = reused_slots(layout, former, both, chosen, threshold=min(cosines) - 1e-9, **ends, impl=impl)
        assert found is not None and torch.equal(found, expected)
    assert torch.equal(listed_slots(chosen, **ends, impl=impl), expected)
    assert min(cosines) < max(cosines)
    assert reused_slots(query, former, both, chosen, threshold=min(cosines) + 1e-9, **ends, impl=impl) is None
    one = torch.tensor([True, False])
    assert reused_slots(query, former, one, chosen, threshold=-1, **ends, impl=impl) is None
    nothing = torch.full_like(former, torch.nan)
    assert reused_slots(query, nothing, both, chosen, threshold=-1, **ends, impl=impl) is None
    itself = query.flatten(1).contiguous()
    assert reused_slots(query, itself, both, chosen, threshold=1 - 1e-12, **ends, impl=impl) is not None


def slots_of_best_pages(scores, count, kv_heads, size, slots, first, newest):
    """Page by page, in plain Python."""
    batch, heads, pages = scores.shape
    lists = []
    for b in range(batch):
        for h in range(kv_heads):
            own = scores[b, h * heads // kv_heads : (h + 1) * heads // kv_heads]
            bound = [-math.inf if column.isnan().any() else float(column.max()) for column in own.T]
            offset = 0 if first is None else int(first[b, 0, 0])
            last = slots - 1 - offset if newest is None else int(newest[b, h % newest.shape[1], 0])
            bound[last // size] = math.inf
            listed = []
            for page in ranked(bound, min(count, pages)):
                for slot in range(page * size + offset, (page + 1) * size + offset):
                    listed.append(-1 if bound[page] == -math.inf or slot >= slots else slot)
            lists.append(listed)
    return torch.tensor(lists).view(batch, kv_heads, -1)


@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize("group", [1, 3])
def test_the_slots_of_pages(poisoned, impl, group):
    scores = made(2, 2 * group, 13)
    scores[0, 0, 4] = torch.nan
    scores[1, :, 5:11] = -torch.inf
    first, newest = torch.tensor([[[0]], [[5]]]), torch.tensor([[[17], [40]], [[3], [2]]])
    found = []
    for count, given in ((4, {}), (9, {"first": first}), (5, {"newest": newest}), (20, {"newest": newest[:, :1]})):
        index = page_slots(scores, count, kv_heads=2, page_size=4, slots=50, impl=impl, **given)
        expected = slots_of_best_pages(scores, count, 2, 4, 50, given.get("first"), given.get("newest"))
        assert torch.equal(index, expected)
        found.append(index)
    assert (found[1] == -1).any() and not torch.equal(found[0][0, 0], found[0][1, 0])


@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize(
    ("pages", "count"), [(40, 1), (131, 7), (131, 64), (600, 3), (600, 40), (600, 599), (2000, 64)]
)
@pytest.mark.parametrize("kind", ["any", "few values", "equal", "rising", "falling", "mostly nothing", "no numbers"])
def test_the_slots_of_the_best_of_many_pages(impl, pages, count, kind):
    scores = made(1, 4, pages, seed=pages)
    if kind == "few values":
        scores = scores.round().abs() * torch.tensor([1.0, -1.0])[torch.arange(pages) % 2]  # both zeros among them
    elif kind == "equal":
        scores = torch.full_like(scores, -2.0)
    elif kind in ("rising", "falling"):
        scores = scores.sort(dim=-1, descending=kind == "falling").values
    elif kind == "mostly nothing":
        scores[:, :, torch.arange(pages) % 9 > 0] = -torch.inf
        scores[0, 0, pages // 2] = torch.inf
    elif kind == "no numbers":
        scores[:, 1, ::2] = torch.nan
        scores[:, 2, 1:] = torch.nan
    slots = 3 * pages - 1
    index = page_slots(scores, count, kv_heads=2, page_size=3, slots=slots, impl=impl)
    assert torch.equal(index, slots_of_best_pages(scores, count, 2, 3, slots, None, None))
    assert index.max() == slots - 1 and index.shape[-1] == 3 * count < slots


@pytest.mark.parametrize("impl", ["native", "apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 80])
def test_a_key_widens_its_page_before_pages_are_chosen(level, poisoned, impl, dtype, dim):
    keys, size = made(2, 2, 40, dim).to(dtype), 8
    keys[0, 0, 33, 2] = torch.nan
    room = [torch.full((2, 2, 7, dim), torch.nan, dtype=bounds_type(dtype)) for _ in range(2)]
    for whole, bound in zip(room, page_bounds(keys[:, :, :32], page_size=size), strict=True):
        whole[:, :, :4] = bound
    narrow = 0
    for slots in range(33, 41):
        query = made(2, 6, 1, dim, seed=slots).to(dtype)
        low, high = (whole[:, :, : -(-slots // size)] for whole in room)
        key = keys[:, :, slots - 1 : slots]
        index = choose_pages(query, low, high, 3, page_size=size, slots=slots, key=key, impl=impl)
        expected = page_bounds(keys[:, :, :slots], page_size=size)
        for bound, own in zip((low, high), expected, strict=True):
            assert torch.equal(bound.nan_to_num(nan=123.0), own.nan_to_num(nan=123.0))
        scores = page_scores(query, *expected)
        assert torch.equal(index, slots_of_best_pages(scores, 3, 2, size, slots, None, None))
        assert torch.equal(index, choose_pages(query, low, high, 3, page_size=size, slots=slots, impl=impl))
        narrow += index.shape[-1] < slots
    assert narrow == 8
    with pytest.raises(ValueError, match="last of 5 pages, got slot 40"):
        choose_pages(query, low, high, 3, page_size=size, slots=41, key=key, impl=impl)


@pytest.mark.parametrize("impl", ["native", "apart"])
@pytest.mark.parametrize("group, dim, rotary", [(1, 64, 64), (3, 80, 20), (4, 64, 32), (8, 128, 128)])
@pytest.mark.parametrize("kind", [None, "bfloat16", "int8"])
def test_attention_to_turned_keys(level, poisoned, impl, group, dim, rotary, kind):
    form = row_format(kind)
    stored = [form.parts(form.pack(made(2, 2, 300, dim, seed=seed))) for seed in (1, 2)]
    (keys, keys_scale), (values, values_scale) = stored
    scales = {} if keys_scale is None else {"keys_scale": keys_scale, "values_scale": values_scale}
    query, sinks = made(2, 2 * group, 1, dim), made(2 * group, seed=3)
    angles = (torch.arange(300)[:, None] * 0.7 ** torch.arange(rotary // 2)).repeat(1, 2)
    rotation = (angles.cos(), angles.sin())
    positions = torch.arange(300, dtype=torch.int32).expand(2, 1, -1).clone()
    positions[0, 0, ::9] = -1
    index = torch.randint(0, 300, (2, 1, 130), generator=torch.Generator().manual_seed(4))
    index[1, 0, 7] = -1

    def turned(rows, at):
        """`rows [batch, heads, n, dim]` in fp64, row `i` turned to position `at[i]`."""
        rows, half = rows.double(), rotary // 2
        cosine, sine = angles.double()[at].cos()[:, :half], angles.double()[at].sin()[:, :half]
        left, right = rows[..., :half], rows[..., half:rotary]
        return torch.cat([left * cosine - right * sine, right * cosine + left * sine, rows[..., rotary:]], dim=-1)

    exact_keys = keys.double() if keys_scale is None else keys.double() * keys_scale.double()[..., None]
    exact_values = values.double() if values_scale is None else values.double() * values_scale.double()[..., None]
    for options in (
        {"scaling": 0.1},
        {"scaling": 0.1, "index": index, "softcap": 5.0},
        {"scaling": 0.1, "index": index, "positions": positions, "sinks": sinks},
    ):
        listed = options.get("index", torch.arange(300)[None, None]).expand(2, 2, -1)
        entries = listed.shape[-1]
        rows = listed.clamp(min=0)[..., None].expand(-1, -1, -1, dim)
        held = (
            torch.zeros_like(listed)
            if "positions" not in options
            else positions.expand(2, 2, -1).gather(2, rows[..., 0])
        )
        held = held.masked_fill(listed < 0, -1)
        parts = {name: value for name, value in options.items() if name not in ("index", "positions")}
        place = torch.arange(entries)
        exact = oracle(
            turned(query, torch.tensor([entries - 1])), turned(exact_keys.gather(2, rows), place), exact_values.gather(2, rows),
            positions=held, **parts,
        )  # fmt: skip
        found = attend_turned(query, keys, values, rotation=rotation, **options, **scales, impl=impl)
        low = attend_turned(query, keys, values, rotation=rotation, **options, **scales, impl="apart")
        for which in range(2):
            assert_within_budget(found[which], low[which], exact[which])
        still = attend_turned(query, keys, values, rotation=(rotation[0], -rotation[1]), **options, **scales, impl=impl)
        assert rejected(assert_within_budget, still[0], low[0], exact[0])


def test_tables_that_do_not_fit_turned_keys_are_refused():
    query, keys = made(1, 2, 1, 8), made(1, 2, 5, 8)
    with pytest.raises(ValueError, match=r"two tables \[at least 5, rotary_dim\]"):
        attend_turned(query, keys, keys, rotation=(made(4, 8), made(4, 8)), scaling=1.0)
    with pytest.raises(ValueError, match="a single row"):
        attend_turned(made(1, 2, 2, 8), keys, keys, rotation=(made(5, 8), made(5, 8)), scaling=1.0)
    many = made(1, 34, 1, 8)
    with pytest.raises(ValueError, match="turns keys for up to 16 queries"):
        attend_turned(many, keys, keys, rotation=(made(5, 8), made(5, 8)), scaling=1.0, impl="native")
    output, _ = attend_turned(many, keys, keys, rotation=(made(5, 8), made(5, 8)), scaling=1.0)
    assert output.shape == (1, 34, 1, 8)
