"""Places of near copies: both implementations against a list in order of use."""

import random

import pytest
import torch

from kvpress.kernels.places import find_places

BOTH = ["native", "reference"]


class InOrderOfUse:
    """One list's copies: each with its slot and when it was used, and nothing else."""

    def __init__(self, capacity):
        self.copies = [(-1, -1)] * capacity  # when, slot

    def find(self, slots, now, base=0, tail=0):
        for row in range(tail):
            for other, (when, slot) in enumerate(self.copies):
                if slot == base + row and other != row:
                    self.copies[other] = when, -1
            self.copies[row] = self.copies[row][0], base + row
        held = {slot: place for place, (_, slot) in enumerate(self.copies) if slot >= 0}
        for slot in slots:
            if slot in held:
                self.copies[held[slot]] = now, slot
        missing = []
        for entry, slot in enumerate(slots):
            if slot >= 0 and slot not in held:
                place = min(range(tail, len(self.copies)), key=lambda place: (self.copies[place][0], place))
                held.pop(self.copies[place][1], None)
                self.copies[place], held[slot] = (now, slot), place
                missing.append(entry)
        return [held[slot] if slot >= 0 else -1 for slot in slots], missing


def state(batch, lists, slots, capacity):
    return [torch.full((batch, lists, size), -1, dtype=torch.int32) for size in (slots, capacity, capacity)]


@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize(
    ("batch", "lists", "count", "capacity", "slots"),
    [(1, 1, 9, 9, 30), (1, 1, 5, 14, 40), (2, 3, 7, 10, 25), (1, 2, 1, 1, 3)],
)
def test_places_are_those_of_a_list_in_order_of_use(poisoned, impl, batch, lists, count, capacity, slots):
    chance = random.Random(slots)
    given, models = state(batch, lists, slots, capacity), [InOrderOfUse(capacity) for _ in range(batch * lists)]
    brought = reused = 0
    for now in range(1, 40):
        index = torch.tensor([chance.choices(range(-1, slots), k=count) for _ in models]).view(batch, lists, count)
        places, missing = find_places(index, *given, now, impl=impl)
        expected, entries = [], []
        for number, (model, row) in enumerate(zip(models, index.view(-1, count).tolist(), strict=True)):
            found, absent = model.find(row, now)
            expected += found
            entries += [number * count + entry for entry in absent]
        assert (places.dtype, places.view(-1).tolist(), missing.tolist()) == (torch.int64, expected, entries)
        place, holder, used = (each.view(len(models), -1).tolist() for each in given)
        for number, model in enumerate(models):
            assert list(zip(used[number], holder[number], strict=True)) == model.copies
            for slot, where in enumerate(place[number]):
                assert (where >= 0) == (slot in holder[number]) and (where < 0 or holder[number][where] == slot)
        brought += len(entries)
        reused += int((index >= 0).sum()) - len(entries)
    assert brought and (reused or capacity == 1)


@pytest.mark.parametrize("impl", BOTH)
def test_the_tail_lies_in_the_first_rows(poisoned, impl):
    """A tail that grows takes the rows of copies; when another begins, what lay in its rows are copies like others."""
    chance, rows, slots = random.Random(3), 12, 40
    given, model, tails = state(1, 1, slots, rows), InOrderOfUse(rows), []
    brought = taken = left = 0
    for now in range(1, 80):
        base, tail = [(16, 0), (16, 1), (16, 2), (16, 4), (20, 0), (20, 3), (23, 2), (24, 0), (24, 1)][now * 9 // 80]
        slot = chance.choices(range(-1, base + tail), k=6)
        places, missing = find_places(torch.tensor([[slot]]), *given, now, tail=tail, base=base, impl=impl)
        if (base, tail) not in tails:
            tails.append((base, tail))
            taken += sum(each >= 0 and each != base + row for row, (_, each) in enumerate(model.copies[:tail]))
            left += sum(16 <= each < base for _, each in model.copies)
        expected = model.find(slot, now, base, tail)
        assert (places.view(-1).tolist(), missing.tolist()) == expected
        place, holder, used = (each.view(-1).tolist() for each in given)
        assert list(zip(used, holder, strict=True)) == model.copies
        assert holder[:tail] == list(range(base, base + tail))
        assert place == [holder.index(each) if each in holder else -1 for each in range(slots)]
        brought += len(expected[1])
    assert brought and taken and left
    with pytest.raises(IndexError, match="below the number of slots"):
        find_places(torch.tensor([[[1]]]), *given, 80, tail=2, base=39, impl=impl)


@pytest.mark.parametrize("impl", BOTH)
def test_what_cannot_be_placed_is_refused(impl):
    index = torch.tensor([[[0, 1]]])
    with pytest.raises(IndexError, match="below the number of slots"):
        find_places(torch.tensor([[[0, 4]]]), *state(1, 1, 4, 2), 1, impl=impl)
    with pytest.raises(ValueError, match="of 0 slots of the tail and 2 of index, got 1 and 1"):
        find_places(index, *state(1, 1, 4, 1), 1, impl=impl)
    with pytest.raises(ValueError, match="of 3 slots of the tail and 2 of index, got 4 and 4"):
        find_places(index, *state(1, 1, 4, 4), 1, tail=3, impl=impl)
    with pytest.raises(ValueError, match="tail and base must be at least 0, got -1 and 0"):
        find_places(index, *state(1, 1, 4, 4), 1, tail=-1, impl=impl)
    with pytest.raises(ValueError, match="must be int64, place, holder and used int32"):
        find_places(index.int(), *state(1, 1, 4, 2), 1, impl=impl)
    with pytest.raises(ValueError, match=r"must be \[batch, lists, …\]"):
        find_places(index, *state(1, 2, 4, 2), 1, impl=impl)
    with pytest.raises(ValueError, match="contiguous host memory"):
        find_places(index.expand(1, 2, 2), *state(1, 2, 4, 2), 1, impl="native")
