"""TidalDecode: two layers choose tokens, the others attend to the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvpress.kernels.choosing import largest_products
from kvpress.policies.base import check_integer
from kvpress.policies.selection import ALL, Every, SelectionPolicy, Selector, SlotView, best_slots
from kvpress.row_format import parts


@dataclass(frozen=True)
class TidalDecode(SelectionPolicy):
    """While decoding, one early layer and one later layer attend to everything and note the `top_k` tokens of largest dot product; the
    layers after each attend to those only.

    Yang et al., "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention", arXiv 2410.05076. Tokens are
    chosen per KV head (the largest dot product of its query heads counts). The newest token competes like any other. Prompts attend to
    everything.

    Args:
        top_k: tokens attended to.
        dense_layers: first compressed layers that attend to everything; the next one selects.
        reselect_layer: compressed layer that selects again; `None` is 2/5 of the depth (the paper: 13 of 32 in Llama-3-8B, but 7 of 32
            in Llama-2-7B), and `kvpress.calibration.reselect_layer` finds a model's best.
    """

    name: ClassVar[str] = "tidaldecode"
    summary: ClassVar[str] = "tokens that two layers chose for all"
    paper: ClassVar[str] = "arXiv 2410.05076"
    fails: ClassVar[str] = "layers that need other tokens than the selecting layer found"
    needs: ClassVar[str] = "the query of each decoded token"
    same_slots_in_all_layers: ClassVar[bool] = True

    top_k: int = 256
    dense_layers: int = 2
    reselect_layer: int | None = None

    def __post_init__(self) -> None:
        check_integer(self.name, "top_k", self.top_k, 1)
        check_integer(self.name, "dense_layers", self.dense_layers, 0)
        if self.reselect_layer is not None:
            check_integer(self.name, "reselect_layer", self.reselect_layer, self.dense_layers + 1)

    def _reselect_layer(self, layers: int) -> int:
        if self.reselect_layer is None:
            return max(self.dense_layers + 1, round(0.4 * layers))
        if self.reselect_layer >= layers:
            raise ValueError(
                f"reselect_layer of {self.name} must be below the model's {layers} compressed layers, got {self.reselect_layer}"
            )
        return self.reselect_layer

    def selector(self, layer: int, ordinal: int, layers: int, shared: dict[str, Any]) -> TidalSelector:
        chooses = ordinal in (self.dense_layers, self._reselect_layer(layers))
        return TidalSelector(self.top_k, chooses=chooses, dense=ordinal < self.dense_layers, shared=shared)


class TidalSelector(Selector):
    """One layer's part: it chooses for the layers after it, follows, or attends to everything."""

    def __init__(self, top_k: int, chooses: bool, dense: bool, shared: dict[str, Any]) -> None:
        self.top_k = top_k
        self.chooses = chooses
        self.tells_at_once = not chooses
        self.dense = dense
        self.shared = shared
        self.hits = self.misses = 0

    def narrows(self, slots: int) -> bool:
        return not self.dense and not self.chooses and slots > self.top_k

    def at_once(self, query: Tensor, slots: int) -> Tensor | Every | None:
        if self.dense or slots <= self.top_k:
            return ALL
        chosen: Tensor | None = None if self.chooses else self.shared["tidaldecode"].get(query.device)
        self.hits += chosen is not None
        return chosen

    def select(self, view: SlotView) -> Tensor | None:
        if self.dense or not view.decoding or view.slots <= self.top_k:
            return None
        if not self.chooses:
            self.hits += 1
            chosen: dict[torch.device, Tensor] = self.shared["tidaldecode"]
            if view.query.device not in chosen:  # a layer on another device than the one that chose
                chosen[view.query.device] = next(iter(chosen.values())).to(view.query.device)
            return chosen[view.query.device]
        self.misses += 1
        slots = slots_of_largest_products(view, self.top_k)
        self.shared["tidaldecode"] = {slots.device: slots}
        return None


def slots_of_largest_products(view: SlotView, top_k: int) -> Tensor:
    """The slots of the `top_k` largest dot products of each KV head: `[batch, heads of the keys, top_k]`, `-1` where there are fewer."""
    keys, scales = parts(view.keys)
    if view.ordered:  # every slot holds a token
        return best_slots(largest_products(view.query, keys, keys_scale=scales), top_k)
    products = largest_products(view.query, keys, positions=view.positions, keys_scale=scales)
    positions = view.positions.expand(-1, products.shape[1], -1)  # a model that expands keys has more heads of them
    best = best_slots(products, top_k, None if view.ascending else positions)
    return best.masked_fill(positions.gather(-1, best) < 0, -1)
