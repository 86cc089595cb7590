"""The slots of a decode step over a steady table: each head's token takes the place of the one evicted last."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvpress.columns import POSITION
from kvpress.kernels.decode_step import PreparedEviction
from kvpress.memory import filled
from kvpress.step_slots import StepSlots

if TYPE_CHECKING:
    from kvpress.keeper import Keeper
    from kvpress.policies.token_rule import TokenRule
    from kvpress.slots import SlotTable


class SteadySlots(StepSlots):
    """All slots of a steady table in its own buffers, while these and the budgets of its heads stay.

    Args:
        keeper: of a table a token of which was just attended to.
        rule: what the policy does with a decoded token.
    """

    def __init__(self, keeper: Keeper, rule: TokenRule) -> None:
        table = keeper.table
        self._keeper, self._prepared = weakref.ref(keeper), weakref.ref(table.steady)
        self._spare = filled((*table.columns[POSITION].shape[:2], 1), 0, table.keys, torch.long)
        sinks, windows = keeper.protected()
        self.eviction = PreparedEviction(
            table.columns[POSITION],
            None if rule.column is None else table.columns[rule.column],
            self._spare,
            sinks=sinks,
            windows=windows,
            fade=rule.fade,
            starts=None if table.rows is None else table.rows.starts,
            lengths=None if table.rows is None else table.rows.lengths,
        )

    @classmethod
    def after(cls, keeper: Keeper, rule: TokenRule | None) -> SteadySlots | None:
        """Those of the keeper's table, if they lie so and the policy does no more than `rule` says."""
        table = keeper.table
        if rule is None or keeper.budgets is None or table.stowage is not None or table.spare is None:
            return None
        column = None if rule.column is None else table.columns[rule.column]
        if PreparedEviction.refusal(table.columns[POSITION], column) is not None:
            return None
        return cls(keeper, rule)

    def foresee(self, table: SlotTable) -> None:
        """Positions are written with each token."""

    def stay(self, table: SlotTable) -> bool:
        if table.spare is None or self._prepared() is not table.prepared:
            return False
        if table.spare is not self._spare:  # a token went the ordinary way
            table.spare = self._spare.copy_(table.spare)
        return True

    def place(self, table: SlotTable) -> tuple[int, int]:
        return 0, 0  # the spare slots, and as many as ever

    def advance(self, table: SlotTable) -> None:
        keeper = self._keeper()
        if keeper is not None:
            keeper.evictions += 1

    def tensors(self) -> list[Tensor]:
        return [] if self.eviction is None else self.eviction.tensors()
