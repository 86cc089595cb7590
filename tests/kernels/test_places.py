"""Places of near copies, and where slots that have none are read: both implementations against plain lists."""

import random
from itertools import pairwise

import pytest
import torch

from kvpress.kernels.places import find_places, rows_to_read

BOTH = ["native", "reference"]


class ByUse:
    """One list's rows: each with how much it was used and its slot, and nothing else."""

    def __init__(self, rows):
        self.rows = [(0, -1)] * rows

    def find(self, slots, base=0, tail=0, vacant=0):
        for row in range(tail):
            for other, (uses, slot) in enumerate(self.rows):
                if slot == base + row and other != row:
                    self.rows[other] = uses, -1
            self.rows[row] = self.rows[row][0], base + row
        for row in range(tail, tail + vacant):
            self.rows[row] = self.rows[row][0], -1
        held = {slot: row for row, (_, slot) in enumerate(self.rows) if slot >= 0}
        missing = [entry for entry, slot in enumerate(slots) if slot >= 0 and slot not in held]
        missing = [entry for entry in missing if slots.index(slots[entry]) == entry]
        if missing:
            now = {held[slot] for slot in slots if slot in held}
            self.rows = [
                (uses - uses // 8 + (1 << 24) * (row in now), slot) for row, (uses, slot) in enumerate(self.rows)
            ]
            free = [row for row in range(tail + vacant, len(self.rows)) if row not in now]
            free.sort(key=lambda row: (-1 if self.rows[row][1] < 0 else self.rows[row][0], row))
            for entry, row in zip(missing, sorted(free[: len(missing)]), strict=True):
                held.pop(self.rows[row][1], None)
                self.rows[row], held[slots[entry]] = (1 << 24, slots[entry]), row
        return [held[slot] if slot >= 0 else -1 for slot in slots], missing


def state(batch, lists, slots, rows):
    sizes = [(slots, -1), (rows, -1), (rows, 0)]
    return [torch.full((batch, lists, size), nothing, dtype=torch.int32) for size, nothing in sizes]


@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize(
    ("batch", "lists", "count", "capacity", "slots"),
    [(1, 1, 9, 9, 30), (1, 1, 5, 14, 40), (2, 3, 7, 10, 25), (1, 2, 1, 1, 3)],
)
def test_places_are_those_of_a_list_by_use(poisoned, impl, batch, lists, count, capacity, slots):
    chance = random.Random(slots)
    given, models = state(batch, lists, slots, capacity), [ByUse(capacity) for _ in range(batch * lists)]
    brought = reused = 0
    for _ in range(40):
        index = torch.tensor([chance.choices(range(-1, slots), k=count) for _ in models]).view(batch, lists, count)
        places, missing = find_places(index, *given, impl=impl)
        expected, entries = [], []
        for number, (model, row) in enumerate(zip(models, index.view(-1, count).tolist(), strict=True)):
            found, absent = model.find(row)
            expected += found
            entries += [number * count + entry for entry in absent]
        assert (places.dtype, places.view(-1).tolist(), missing.tolist()) == (torch.int64, expected, entries)
        place, holder, uses = (each.view(len(models), -1).tolist() for each in given)
        for number, model in enumerate(models):
            assert list(zip(uses[number], holder[number], strict=True)) == model.rows
            for slot, where in enumerate(place[number]):
                assert (where >= 0) == (slot in holder[number]) and (where < 0 or holder[number][where] == slot)
        brought += len(entries)
        reused += int((index >= 0).sum()) - len(entries)
    assert brought and (reused or capacity == 1)


@pytest.mark.parametrize("impl", BOTH)
def test_the_tail_lies_in_the_first_rows(poisoned, impl):
    """A tail that grows takes the rows of copies; when another begins, what lay in its rows are copies like others."""
    chance, rows, slots = random.Random(3), 12, 40
    given, model, tails = state(1, 1, slots, rows), ByUse(rows), []
    brought = taken = left = 0
    for now in range(1, 80):
        base, tail = [(16, 0), (16, 1), (16, 2), (16, 4), (20, 0), (20, 3), (23, 2), (24, 0), (24, 1)][now * 9 // 80]
        vacant = 2 if tail < 3 and now > 30 else 0
        slot = chance.choices(range(-1, base + tail), k=6)
        places, missing = find_places(torch.tensor([[slot]]), *given, tail=tail, base=base, vacant=vacant, impl=impl)
        if (base, tail) not in tails:
            tails.append((base, tail))
            taken += sum(each >= 0 and each != base + row for row, (_, each) in enumerate(model.rows[:tail]))
            left += sum(16 <= each < base for _, each in model.rows)
        expected = model.find(slot, base, tail, vacant)
        assert (places.view(-1).tolist(), missing.tolist()) == expected
        place, holder, uses = (each.view(-1).tolist() for each in given)
        assert list(zip(uses, holder, strict=True)) == model.rows
        assert holder[: tail + vacant] == [*range(base, base + tail), *[-1] * vacant]
        assert place == [holder.index(each) if each in holder else -1 for each in range(slots)]
        brought += len(expected[1])
    assert brought and taken and left
    with pytest.raises(IndexError, match="below the number of slots"):
        find_places(torch.tensor([[[1]]]), *given, tail=2, base=39, impl=impl)


@pytest.mark.parametrize("impl", BOTH)
def test_what_cannot_be_placed_is_refused(impl):
    index = torch.tensor([[[0, 1]]])
    with pytest.raises(IndexError, match="below the number of slots"):
        find_places(torch.tensor([[[0, 4]]]), *state(1, 1, 4, 2), impl=impl)
    with pytest.raises(ValueError, match=r"0 \+ 0 rows for the tail and one for each of 2 slots, got 1 and 1"):
        find_places(index, *state(1, 1, 4, 1), impl=impl)
    with pytest.raises(ValueError, match=r"3 \+ 0 rows for the tail and one for each of 2 slots, got 4 and 4"):
        find_places(index, *state(1, 1, 4, 4), tail=3, impl=impl)
    with pytest.raises(ValueError, match="tail, base and vacant must be at least 0, got -1, 0 and 0"):
        find_places(index, *state(1, 1, 4, 4), tail=-1, impl=impl)
    with pytest.raises(ValueError, match="must be int64, place, holder and uses int32"):
        find_places(index.int(), *state(1, 1, 4, 2), impl=impl)
    with pytest.raises(ValueError, match=r"must be \[batch, lists, …\]"):
        find_places(index, *state(1, 2, 4, 2), impl=impl)
    with pytest.raises(ValueError, match="contiguous host memory"):
        find_places(index.expand(1, 2, 2), *state(1, 2, 4, 2), impl="native")


@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize(
    ("batch", "lists", "changed"), [(1, 1, False), (1, 1, True), (3, 1, False), (1, 2, False), (2, 3, True)]
)
def test_rows_to_read_are_those_of_a_sorted_list(poisoned, impl, batch, lists, changed):
    chance, block, blocks, count, rows = random.Random(batch * 7 + lists), 5, 6, 17, 40
    several = disordered = 0
    for ascends in (True, False) * 10:
        then = [[chance.randrange(4) for _ in range(batch)] for _ in range(blocks)] if changed else None
        slots = [chance.sample(range(block * blocks), count) for _ in range(batch * lists)]
        slots = [sorted(each) if ascends else each for each in slots]
        index = torch.tensor(slots).view(batch, lists, count)
        places = torch.tensor([chance.sample(range(rows), count) for _ in slots]).view(batch, lists, count)
        entries = sorted(chance.sample(range(batch * lists * count), chance.randrange(batch * lists * count + 1)))
        expected = []
        for entry in entries:
            row, group, column = entry // count // lists, entry // count % lists, entry % count
            slot = slots[row * lists + group][column]
            before = row if then is None else then[slot // block][row]
            number = (before * lists + group) * block + slot % block
            target = (row * lists + group) * rows + int(places[row, group, column])
            expected.append((slot // block, number, target))
        disordered += [each[:2] for each in expected] != sorted(each[:2] for each in expected)
        if len({each[:2] for each in expected}) < len(expected):
            continue  # two batch rows that were one: either may come first
        found = rows_to_read(
            torch.tensor(entries, dtype=torch.int64),
            index,
            places,
            rows=rows,
            block=block,
            blocks=blocks,
            then=None if then is None else torch.tensor(then),
            impl=impl,
        )
        assert all(each.dtype == torch.int64 and each.is_contiguous() for each in found)
        which, firsts, numbers, targets = (each.tolist() for each in found)
        assert len(firsts) == len(which) + 1 and firsts[0] == 0 and which == sorted(set(which))
        owners = [number for number, (a, b) in zip(which, pairwise(firsts), strict=True) for _ in range(a, b)]
        assert list(zip(owners, numbers, targets, strict=True)) == sorted(expected)
        several += len(which) > 1 and len(numbers) > len(which)
    assert several > 5 and (disordered or not changed)


@pytest.mark.parametrize("impl", BOTH)
def test_rows_that_do_not_exist_are_refused(impl):
    index, then = torch.tensor([[[0, 9, -1]]]), torch.zeros(2, 1, dtype=torch.int64)
    sizes = {"rows": 4, "block": 4, "blocks": 2, "impl": impl}
    for entry in (1, 2, 3, -1):
        with pytest.raises(IndexError, match="below the number of slots"):
            rows_to_read(torch.tensor([entry]), index, index, **sizes)
    none = rows_to_read(torch.empty(0, dtype=torch.int64), index, index, **sizes)
    assert [each.tolist() for each in none] == [[], [0], [], []]
    with pytest.raises(ValueError, match=r"must be \[batch, lists, n\]"):
        rows_to_read(torch.tensor([0]), index, index[..., :2], **sizes)
    with pytest.raises(ValueError, match="must be int64"):
        rows_to_read(torch.tensor([0]), index, index.int(), **sizes)
    with pytest.raises(ValueError, match=r"then must be \[2, 1\] for blocks and batch, got \(1, 1\)"):
        rows_to_read(torch.tensor([0]), index, index, then=then[:1], **sizes)
    with pytest.raises(ValueError, match="block and blocks must be at least 1, got 0 and 2"):
        rows_to_read(torch.tensor([0]), index, index, **(sizes | {"block": 0}))
