"""Runs a program on caches side by side: without offload, with it, and where all is kept a full cache of transformers. They must agree."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache as remembered
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import torch
from cache_programs import ENDLESS, MOST_ROWS, Operation, Program
from torch import Tensor
from transformers import DynamicCache

from kvpress import PolicyCache
from kvpress.errors import CacheStateError, KVPressError
from kvpress.layer import PolicyLayer
from kvpress.offload import Offload
from kvpress.offload.attached import Attached
from kvpress.offload.errors import TierFullError
from kvpress.offload.hot_slots import HotSlots
from kvpress.policies import key_index
from kvpress.row_format import unpacked
from kvpress.slots import SlotTable
from kvpress.testing.families import random_tokens, tiny_model
from kvpress.testing.hadamard_oracle import hadamard

MOST_LANES = 3
LARGEST_ERROR = 1e-4  # of logits, against a full cache


class Disagreement(AssertionError):
    """Two caches that went through the same gave different answers."""


@remembered
def the_model() -> Any:
    return tiny_model("llama", num_hidden_layers=4, hidden_size=64, head_dim=16, max_position_embeddings=2048)


@dataclass(eq=False)
class Lane:
    """Caches that went through the same.

    Attributes:
        mask: `[batch, tokens seen]`, 0 for padding.
        full: of transformers; None where it would not agree.
    """

    plain: PolicyCache
    offloaded: PolicyCache
    full: DynamicCache | None
    mask: Tensor

    @property
    def caches(self) -> list[Any]:
        return [each for each in (self.plain, self.offloaded, self.full) if each is not None]

    def copied(self, offloaded: PolicyCache) -> Lane:
        return Lane(copy.deepcopy(self.plain), offloaded, copy.deepcopy(self.full), self.mask.clone())


class Lanes:
    """The copies of one cache, which go on each in its own way.

    Attributes:
        happened: how often what was.
    """

    def __init__(self, program: Program, folder: Path, happened: Counter[str]) -> None:
        self.setting, self.folder, self.happened = program.setting, folder, happened
        self.model = the_model()
        setting, disk = self.setting, self.folder / "tiers" if self.setting.disk else None
        options = Offload(host=setting.host, disk=disk, block=setting.block, prefetch=setting.prefetch)
        self.serial = self.saved = 0
        self.lanes = [Lane(self._made(None), self._made(options), self._full(), self._empty(len(setting.pads)))]
        self.first = self.lanes[0].offloaded

    def _made(self, offload: Offload | None) -> PolicyCache:
        return PolicyCache(self.model, self.setting.policy, kv_dtype=self.setting.kv_dtype, offload=offload)

    def _full(self) -> DynamicCache | None:
        comparable = self.setting.whole and self.setting.kv_dtype is None
        return DynamicCache(config=self.model.config) if comparable else None

    @staticmethod
    def _empty(rows: int) -> Tensor:
        return torch.ones(rows, 0, dtype=torch.long)

    def do(self, operation: Operation) -> None:
        lane = self.lanes[operation.lane % len(self.lanes)]
        torch.set_num_threads(operation.threads)
        try:
            with torch.inference_mode() if operation.inference else torch.no_grad():
                getattr(self, operation.name)(
                    lane, *([operation.amount] if operation.name == "forward" else operation.amount)
                )
        finally:
            torch.set_num_threads(1)
        if lane in self.lanes:
            self._compare_facts(lane)

    # -- forwards ------------------------------------------------------------------------------------------------------

    def forward(self, lane: Lane, lengths: tuple[int, ...]) -> None:
        for length in lengths:
            if not self._step(lane, length):
                return

    def _step(self, lane: Lane, length: int) -> bool:
        """One forward of all caches; False where a tier was too small, after which they begin anew."""
        self.serial += 1
        first = lane.mask.shape[1]
        new = torch.ones(len(lane.mask), length, dtype=torch.long)
        if first == 0 and len(lane.mask) == len(self.setting.pads):
            for row, count in enumerate(self.setting.pads):
                new[row, : min(count, length - 1)] = 0
        mask = torch.cat([lane.mask, new], dim=1)
        ids, positions = random_tokens(*new.shape, seed=self.serial), (mask.cumsum(-1) - 1).clamp(min=0)[:, first:]

        def logits(cache: Any) -> Tensor:
            found = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
            return found[new.bool()]

        expected = logits(lane.plain)
        try:
            found = logits(lane.offloaded)
        except TierFullError:
            self.happened["forwards refused"] += 1
            try:
                found = logits(lane.offloaded)
            except (TierFullError, CacheStateError):
                self.reset(lane)
                return False
            self.happened["forwards served at the second try"] += 1
        self.happened["forwards"] += 1
        if not torch.equal(expected, found):
            raise Disagreement(f"offload changed logits by {float((expected - found).abs().max())}")
        if lane.full is not None:
            error = float((logits(lane.full) - expected).abs().max())
            if not error <= LARGEST_ERROR:
                raise Disagreement(f"a full cache gives other logits, by {error}")
            self.happened["forwards compared with a full cache"] += 1
        lane.mask = mask
        return True

    def beams(self, lane: Lane, steps: int, number: int) -> None:
        random = Random(number)
        for _ in range(steps):
            rows = len(lane.mask)
            index = [random.randrange(rows) for _ in range(rows)]
            if not self._rows(lane, index, lambda cache, index=index: cache.reorder_cache(torch.tensor(index))):
                return
            if not self._step(lane, 1):
                return

    # -- verbs ---------------------------------------------------------------------------------------------------------

    def crop(self, lane: Lane, tokens: int) -> None:
        seen = lane.mask.shape[1]
        tokens = seen if tokens == ENDLESS else min(tokens, seen - int((lane.mask == 0).sum(dim=1).max()) - 1)
        bases = [layer.table.base for layer in lane.offloaded.policy_layers]
        if tokens >= 0 and self._all(lane, lambda cache: cache.crop(-tokens)):
            lane.mask = lane.mask[:, : seen - tokens]
            if lane.full is not None and tokens == seen:
                lane.full = self._full()
            self.happened["crops"] += 1
            self.happened["blocks cut"] += bases != [layer.table.base for layer in lane.offloaded.policy_layers]

    def select(self, lane: Lane, number: int) -> None:
        random, rows = Random(number), len(lane.mask)
        if random.random() < 0.4 and 2 * rows <= MOST_ROWS:
            self._rows(
                lane, [row for row in range(rows) for _ in range(2)], lambda cache: cache.batch_repeat_interleave(2)
            )
            return
        index = [random.randrange(rows) for _ in range(random.randint(1, MOST_ROWS))]
        self._rows(lane, index, lambda cache: cache.batch_select_indices(torch.tensor(index)))

    def _rows(self, lane: Lane, index: list[int], verb: Callable[[Any], None]) -> bool:
        if lane.mask.shape[1] == 0:
            return True
        if not self._all(lane, verb):
            return False
        lane.mask = lane.mask[index]
        self.happened["rows selected"] += 1
        return True

    def fork(self, lane: Lane, number: int) -> None:
        try:
            copied = copy.deepcopy(lane.offloaded)
        except TierFullError:
            self.happened["forks refused"] += 1
            return
        self._add(lane.copied(copied), number)
        self.happened["forks"] += 1

    def save(self, lane: Lane, number: int) -> None:
        """Both caches are saved, and what was loaded goes on beside them, without offload."""
        loaded = []
        for cache in (lane.plain, lane.offloaded):
            self.saved += 1
            directory = self.folder / f"saved {self.saved}"
            try:
                cache.save(directory)
            except CacheStateError:
                assert cache.seen_tokens == 0
                return
            except TierFullError:
                self.happened["saves refused"] += 1
                assert not directory.exists()
                return
            loaded.append(PolicyCache.load(directory, self.model))
        self._add(Lane(*loaded, copy.deepcopy(lane.full), lane.mask.clone()), number)
        self.happened["saves"] += 1

    def reset(self, lane: Lane, number: int = 0) -> None:
        lane.plain.reset()
        lane.offloaded.reset()
        self.happened["resets"] += 1
        lane.full, lane.mask = self._full(), self._empty(len(self.setting.pads))

    def record(self, lane: Lane, number: int) -> None:
        """From now on eviction waits for a `crop`; a full cache has nothing to wait with."""
        self._all(lane, lambda cache: None if cache is lane.full else cache.activate_past_recording())

    def _all(self, lane: Lane, verb: Callable[[Any], None]) -> bool:
        """Do `verb` to all caches. What one refuses, the others go on without: a refusal must leave everything as it was."""
        before, full = copy.deepcopy(lane.plain), copy.deepcopy(lane.full)
        refused: KVPressError | None = None
        for cache in lane.caches:
            try:
                verb(cache)
            except (CacheStateError, TierFullError) as error:
                if cache is lane.full:
                    raise
                refused = error
        if refused is None:
            return True
        lane.plain, lane.full = before, full
        self.happened[f"{type(refused).__name__} at a verb"] += 1
        if isinstance(
            refused, TierFullError
        ):  # some layers may have it behind them: the cache says so, or is as it was
            try:
                self._step(lane, 1)
            except CacheStateError:
                self.happened["resets asked for"] += 1
                self.reset(lane)
        return False

    def _add(self, lane: Lane, number: int) -> None:
        if len(self.lanes) < MOST_LANES:
            self.lanes.append(lane)
            return
        place = number % len(self.lanes)
        former = self.lanes[place].offloaded
        self.lanes[place] = lane
        self._count(former)
        former.close()

    # -- what must hold ------------------------------------------------------------------------------------------------

    def _compare_facts(self, lane: Lane) -> None:
        plain, offloaded = lane.plain, lane.offloaded
        assert plain.seen_tokens == offloaded.seen_tokens == lane.mask.shape[1]
        for layer in plain.policy_layers:
            if layer.is_initialized:
                self._check_index(layer)
                kept = [cache.kept_positions(layer.layer_idx) for cache in (plain, offloaded)]
                if not torch.equal(*kept):
                    raise Disagreement(f"layer {layer.layer_idx} keeps other tokens with offload")
        for tier in offloaded.report().tiers:
            assert tier.limit is None or tier.peak_nbytes <= tier.limit
            assert tier.failures == 0

    @staticmethod
    def _check_index(layer: PolicyLayer) -> None:
        """A vote's index holds the keys that the slots hold now. Those of a prompt are taken into it before they are packed."""
        index = getattr(layer.selector, "index", None)
        if index is None or index.codes is None or layer.table.spare is not None or layer.table.packed:
            return
        assert index.covered <= layer.table.count, "the index holds keys of tokens that are gone"
        keys = unpacked(layer.table.readable()[0])[:, :, : index.covered].double()
        codes, scales = index.read(0, index.covered)
        steps = scales.double()[..., None]
        if index.form == "int4":
            keys = (keys - index.centre[:, :, None]) @ hadamard(keys.shape[-1])
            codes = torch.stack([codes % 16, codes // 16], dim=-1).flatten(-2).double() - 8
            steps = steps * (keys.shape[-1] & -keys.shape[-1]) ** 0.5
        error = (codes.double() * steps - keys).abs()
        if not bool((error <= 0.51 * steps + 1e-12).all()):
            raise Disagreement(f"the index of layer {layer.layer_idx} holds other keys than its slots")

    def _count(self, cache: PolicyCache) -> None:
        report = cache.report()
        self.happened["evictions"] += report.evictions
        self.happened["selections"] += report.selections
        self.happened["selections reused"] += report.selections_reused

    def close(self) -> None:
        """Close all, and see that nothing is left."""
        for lane in self.lanes:
            self._count(lane.offloaded)
        open_tiers = [lane.offloaded for lane in self.lanes if lane.offloaded.tiers is not None]
        if open_tiers:
            for tier in open_tiers[0].report().tiers:
                for name in ("hits", "misses", "bytes_in", "bytes_out"):
                    self.happened[f"{tier.tier} {name}"] += getattr(tier, name)
            for cache in open_tiers[1:]:
                cache.close()
            open_tiers[0].reset()
            blocks = sum(tier.blocks for tier in open_tiers[0].report().tiers)
            open_tiers[0].close()
            assert blocks == 0, "blocks that no cache relies on are left"
        self.lanes.clear()


@contextlib.contextmanager
def counting(happened: Counter[str]) -> Iterator[None]:
    """Counts what reports do not tell: near copies found, made and given up, and working memory read ahead and used."""
    find, read_ahead = HotSlots.find, Attached.read_ahead

    def counted_find(self: HotSlots, index: Tensor, table: SlotTable) -> tuple[Tensor, Tensor]:
        before = self.holder.clone()
        places, missing = find(self, index, table)
        happened["near copies found"] += index.numel() - len(missing)
        happened["near copies made"] += len(missing)
        happened["near copies given up"] += int(((before >= 0) & (before != self.holder)).sum())
        happened["tails among near copies"] += self.is_tail(table.keys)
        return places, missing

    def counted_read_ahead(self: Attached, layer: int) -> Any:
        found = read_ahead(self, layer)
        happened["layers read ahead"] += found is not None
        return found

    with patch.object(HotSlots, "find", counted_find), patch.object(Attached, "read_ahead", counted_read_ahead):
        yield


def run_program(program: Program, folder: Path, happened: Counter[str]) -> None:
    """Run it, in an empty `folder`.

    Raises:
        Disagreement, AssertionError: what must hold does not.
    """
    lanes = Lanes(program, folder, happened)
    try:
        with counting(happened), patch.object(key_index, "FIRST", 40):  # int4 keys get a centre on the way
            for operation in program.operations:
                lanes.do(operation)
        lanes.close()
        left = list((folder / "tiers").glob("*")) if program.setting.disk else []
        assert not left, "files are left"
    finally:
        for lane in lanes.lanes:
            lane.offloaded.close()
        lanes.lanes.clear()
        gc.collect(0)
