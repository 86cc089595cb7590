"""Attention of a forward's rows over all slots of a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from kvpress.forward import Forward
from kvpress.kernels.attention import attend, attend_with_weights
from kvpress.observation import AttentionArguments

if TYPE_CHECKING:
    from kvpress.slots import SlotTable


def attend_table(
    table: SlotTable,
    forward: Forward,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    arguments: AttentionArguments,
    reduction: str | None,
    expands_keys: bool,
) -> Tensor:
    """Output `[batch, query_heads, rows, value_dim]`.

    Args:
        keys, values: what `update` returned, or what the model made of it; read where `forward` names nothing else.
        reduction: of the weights that a decoded token leaves in `forward`; `None`: none.
        expands_keys: the model made other keys of the table's.
    """
    if forward.prepared is not None:
        output, forward.weights = forward.prepared.attention.attend(
            query,
            forward.count,
            positions=forward.visible,
            reduction=reduction,
            scaling=arguments.scaling,
            softcap=arguments.softcap,
            sinks=arguments.sinks,
        )
        return output
    several, visible = forward.rows > 1, forward.visible
    layout: dict[str, Any] = {}
    if forward.slots is not None:
        keys, values, layout = forward.slots
    elif table.rows is not None and expands_keys:
        visible = table.positions  # past a short head's slots there is nothing
    options = layout | {
        "positions": visible, "scaling": arguments.scaling, "softcap": arguments.softcap, "sinks": arguments.sinks
    }  # fmt: skip
    if not several and reduction is not None:
        output, _, forward.weights = attend_with_weights(query, keys, values, reduction=reduction, **options)
        return output
    placed = forward.placed.positions[:, -query.shape[2] :] if several else None
    output, _ = attend(query, keys, values, query_positions=placed, causal=several and visible is None, **options)
    return output
