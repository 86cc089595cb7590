"""SlotTable against a plain model: for each batch row and KV head a list of (position, key, value, column) rows."""

import copy
import random

import numpy
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvpress.memory import held_bytes
from kvpress.slots import POSITION, SlotTable

KV_HEADS, KEY_DIM, VALUE_DIM = 2, 3, 2
COLUMN = "score"


class Machine(RuleBasedStateMachine):
    @initialize(batch=st.integers(1, 3), tokens=st.integers(1, 5), seed=st.integers(0, 99), pads=st.integers(0, 3))
    def start(self, batch, tokens, seed, pads):
        self.random = random.Random(seed)
        self.table = SlotTable((COLUMN,))
        self.seen = [0] * batch
        self.rows = [[[] for _ in range(KV_HEADS)] for _ in range(batch)]
        self.unique = 0
        self.undoable = 0
        self.apart = False  # an eviction has told heads apart
        self.append(tokens, [self.random.randint(0, min(pads, tokens - 1)) for _ in range(batch)])

    def append(self, tokens, pads):
        batch = len(self.rows)
        shape = (batch, KV_HEADS, tokens)
        serial = self.unique + torch.arange(batch * KV_HEADS * tokens, dtype=torch.float32).view(shape)
        self.unique += serial.numel()
        keys = serial[..., None] + torch.arange(KEY_DIM) / 8
        values = -serial[..., None] - torch.arange(VALUE_DIM) / 8
        new = self.table.append(keys.transpose(2, 3).contiguous().transpose(2, 3), values)
        positions = torch.full((batch, tokens), -1, dtype=torch.int32)
        for row in range(batch):
            for token in range(pads[row], tokens):
                positions[row, token] = self.seen[row]
                for head in range(KV_HEADS):
                    self.rows[row][head].append([self.seen[row], float(serial[row, head, token]), 0.0])
                self.seen[row] += 1
        self.table.place(new, positions, tuple(tokens - count for count in pads))
        self.table.settle()

    @rule(tokens=st.integers(1, 4), data=st.data())
    @precondition(lambda self: self.table.spare is None)
    def grow(self, tokens, data):
        pads = (
            [data.draw(st.integers(0, tokens - 1)) for _ in self.rows] if self.table.count < 4 else [0] * len(self.rows)
        )
        self.append(tokens, pads)
        self.undoable = tokens

    @rule(tokens=st.integers(2, 4))
    @precondition(lambda self: self.table.spare is not None)
    def resume(self, tokens):
        self.append(tokens, [0] * len(self.rows))
        self.undoable = tokens

    @rule(back=st.booleans())
    @precondition(lambda self: self.table.spare is not None)
    def decode(self, back):
        """One token into the spare slot; taken back, or one token a head is retired."""
        self.append(1, [0] * len(self.rows))
        if back:
            self.table.drop_last(1)
            for row, heads in enumerate(self.rows):
                self.seen[row] -= 1
                for head in heads:
                    head.pop()
            return
        slots = self.table.positions
        victims = torch.zeros(len(self.rows), KV_HEADS, 1, dtype=torch.long)
        for row, heads in enumerate(self.rows):
            for head, held in enumerate(heads):
                capacity = slots.shape[-1] if self.table.rows is None else int(self.table.rows.capacities[row, head])
                own = slots[row, head, :capacity].tolist()
                if len(held) == capacity:
                    gone = self.random.choice(held)
                    held.remove(gone)
                    victims[row, head, 0] = own.index(gone[0])
                else:
                    victims[row, head, 0] = own.index(-1)
        self.table.retire(victims)

    @rule(ragged=st.booleans(), room=st.sampled_from([1, 1, 1, 3]))
    @precondition(lambda self: self.table.spare is None and self.table.count > 1)
    def keep(self, ragged, room):
        """Each head keeps a random set of its own, as many as it has and may."""
        batch, count = len(self.rows), self.table.count
        capacities = numpy.full((batch, KV_HEADS), self.random.randint(1, count - 1))
        if ragged:
            capacities = numpy.array(
                [[self.random.randint(1, count + 2) for _ in range(KV_HEADS)] for _ in range(batch)]
            )
            ragged = capacities.min() != capacities.max()
        wanted = numpy.minimum(capacities, [[len(held) for held in heads] for heads in self.rows])
        most = int(wanted.max())
        index = torch.zeros(batch, KV_HEADS, most, dtype=torch.long)
        positions = self.table.positions
        for row in range(batch):
            for head in range(KV_HEADS):
                slots = list(range(count))
                real = [slot for slot in slots if positions[row, head, slot] >= 0]
                number = int(wanted[row, head])
                chosen = sorted(self.random.sample(real, number))
                index[row, head, most - number :] = torch.tensor(chosen)
                kept = {int(positions[row, head, slot]) for slot in chosen}
                self.rows[row][head] = [item for item in self.rows[row][head] if item[0] in kept]
        if ragged:
            self.table.keep_ragged(index, wanted, capacities + 1)
        else:
            self.table.keep(index, wanted, room)
        self.undoable, self.apart = 0, True

    @rule(data=st.data())
    @precondition(lambda self: self.table.spare is None and self.undoable)
    def take_back(self, data):
        tokens = data.draw(st.integers(0, self.undoable))
        lost = self.table.positions[:, 0, self.table.count - tokens :] >= 0
        self.table.drop_last(tokens)
        for row, heads in enumerate(self.rows):
            number = int(lost[row].sum())
            self.seen[row] -= number
            for head in heads:
                del head[len(head) - number :]
        self.undoable -= tokens

    @rule(data=st.data())
    def select(self, data):
        index = data.draw(st.lists(st.integers(0, len(self.rows) - 1), min_size=1, max_size=4))
        self.table.select_batch(torch.tensor(index))
        self.rows = [[[list(item) for item in head] for head in self.rows[row]] for row in index]
        self.seen = [self.seen[row] for row in index]

    @rule()
    def copied(self):
        """Another table goes on; what is written there does not reach the first."""
        self.table, before = copy.deepcopy(self.table), self.table
        before.columns.stored(POSITION).fill_(99)

    @rule(once=st.booleans())
    def saved(self, once):
        """A table made of the state goes on, of positions by head, or stored once where they are; heads that agree share them again."""
        state, positions = self.table.state(), self.table.columns[POSITION]
        own = self.table.columns.stored(POSITION) if once else positions.contiguous()
        state["columns"] = state["columns"] | {POSITION: own.clone()}
        self.table = SlotTable((COLUMN,))
        self.table.load_state(state)
        if self.apart and self.table.spare is None:
            self.apart = not bool((positions == positions[:, :1]).all())

    @rule(value=st.integers(1, 9))
    def write_column(self, value):
        """Column values that name their token: they must travel with it."""
        column, positions = self.table.policy_columns[COLUMN], self.table.positions
        column.copy_(torch.where(positions >= 0, positions * 10.0 + value, column))
        for heads in self.rows:
            for head in heads:
                for item in head:
                    item[2] = item[0] * 10.0 + value

    @invariant()
    def same(self):
        if not hasattr(self, "table"):
            return
        keys, values = self.table.dense()
        positions, column = self.table.positions, self.table.policy_columns[COLUMN]
        kept = self.table.kept_positions().tolist()
        spare = None if self.table.spare is None else self.table.spare.tolist()
        assert torch.equal(keys, keys[..., :1] + torch.arange(KEY_DIM) / 8 * (keys[..., 1:2] != 0))
        serials, seconds, last = keys[..., 0].tolist(), values[..., 0].tolist(), values[..., 1].tolist()
        places, scores = positions.tolist(), column.tolist()
        for row, heads in enumerate(self.rows):
            for head, held in enumerate(heads):
                found = []
                for slot in range(self.table.count):
                    if places[row][head][slot] < 0 or (spare is not None and spare[row][head][0] == slot):
                        continue
                    serial = serials[row][head][slot]
                    assert seconds[row][head][slot] == -serial and last[row][head][slot] == -serial - 1 / 8
                    found.append([places[row][head][slot], serial, scores[row][head][slot]])
                assert sorted(found) == held
                assert self.table.held[row, head] == len(held)
                listed = kept[row][head]
                assert [p for p in listed if p >= 0] == [item[0] for item in held]
                assert listed == sorted(listed, key=lambda p: (p < 0, p))
        stored, seen = self.table.columns.stored(POSITION), self.table.columns[POSITION]
        assert seen.shape == (len(self.rows), KV_HEADS, seen.shape[2]) and stored.is_contiguous()
        assert stored.shape[1] == (KV_HEADS if self.apart else 1)
        assert held_bytes([seen]) == held_bytes([stored]) == stored.nbytes
        assert not keys.isnan().any()
        if spare is None:
            assert self.table.rows is None
            assert (positions.diff(dim=-1) > 0)[positions[..., 1:] > 0].all(), "a growing table is in ascending order"


Machine.TestCase.settings = settings(max_examples=40, stateful_step_count=15, deadline=None, derandomize=True)
TestSlotTable = Machine.TestCase
