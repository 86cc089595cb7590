"""Rotation of keys and queries by the model's own rotary module: undone, and done again at other positions."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvpress.cache_argument import passed
from kvpress.errors import UnsupportedModelError
from kvpress.kernels.rotation import rotate as turn
from kvpress.kernels.rotation.prepared import PreparedRotation

TABLE = 4096  # positions of the first table; a longer one has a power of two of them
TABLES = 4  # held at a time
AHEAD = 64  # positions whose cosines are asked for at once
FIXED = ("default", "linear", "llama3", "yarn")  # rope types whose cosines depend on nothing but the position


class Rotation:
    """The rotary embedding of one model.

    What the model rotated is undone by its own module, called once more with the same positions, since frequencies may follow the length
    of whatever text the model read last (dynamic NTK). Re-indexed positions are rotated by a module apart.

    Args:
        model: whose rotary module and `apply_rotary_pos_emb` are the source of truth.

    Raises:
        UnsupportedModelError: no such module, or one whose rotation could not be undone in a trial on two tokens.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else model
        module = getattr(decoder, "rotary_emb", None)
        apply = getattr(sys.modules[type(decoder).__module__], "apply_rotary_pos_emb", None)
        if module is None or apply is None:
            raise UnsupportedModelError(
                f"model type {model.config.model_type!r} has no rotary module to undo: positions='reindex' cannot serve it"
            )
        self._apply: Callable[..., tuple[Tensor, Tensor]] = apply
        self._as_seen = module
        typed = "layer_type" in inspect.signature(module.forward).parameters
        self._arguments: dict[str, Any] = {"layer_type": "full_attention"} if typed else {}
        self._tables: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}  # by positions they have
        config = model.config.get_text_config(decoder=True)
        parameters = getattr(config, "rope_parameters", None) or {}
        self._follows_length = parameters.get("rope_type") in ("dynamic", "longrope")
        self._fixed = parameters.get("rope_type") in FIXED
        self._ahead: dict[
            torch.dtype, tuple[int, PreparedRotation]
        ] = {}  # the first position, and the ways back from it on
        self._trained = int(parameters.get("original_max_position_embeddings") or config.max_position_embeddings)
        # position ids of this forward, the type of what was rotated to them, and the way back
        self._seen: dict[torch.device, tuple[Tensor, torch.dtype, PreparedRotation]] = {}
        # what `tables` was asked last, and gave
        self._last: tuple[tuple[int, torch.dtype, torch.device], tuple[Tensor, Tensor]] | None = None
        self._halves = False  # whether cosines are given once for both halves of a head
        self._by_kernel = False  # whether the rotation is the one that `kvpress.kernels.rotation` knows
        self._reindexed = (
            type(module)(module.config) if self._follows_length else copy.deepcopy(module)
        )  # as for a short text
        self._as_seen = copy.deepcopy(module)  # a trial on three tokens must not disturb it
        self._check(model)
        self._as_seen = module

    def __deepcopy__(self, memo: dict[int, Any]) -> Rotation:
        return self  # the model's, and tables

    def begin(self) -> None:
        """A new forward: position ids that look like the former ones may have been changed in place."""
        self._seen.clear()

    def undo(self, rotated: Tensor, position_ids: Tensor) -> Tensor:
        """What `rotated [batch, heads, tokens, dim]` was before the model rotated it to `position_ids [batch or 1, tokens]`."""
        back = self.way_back(rotated, position_ids)
        if self._by_kernel:
            return back.rotate(rotated)
        cos, sin = (table.expand(rotated.shape[0], -1, -1) for table in (back.cosine, back.sine))
        return self._rotate(rotated.to(cos.dtype), cos, -sin).to(rotated.dtype)

    def undo_in_place(self, buffer: Tensor, slot: int, rotated: Tensor, position_ids: Tensor) -> bool:
        """As `undo`, of `rotated [batch, heads, 1, dim]`, of which a copy lies in `slot` of `buffer [batch, heads, room, dim]`: that one.

        Returns:
            Whether it was done: a kernel must be able to serve.
        """
        if not self._by_kernel or buffer.dtype != rotated.dtype or not (buffer.is_cpu or buffer.is_cuda):
            return False
        back = self.way_back(rotated, position_ids)
        return back.rotate_in_place(buffer, slot) if buffer.is_cpu else back.rotate_into(buffer, slot, rotated)

    def way_back(self, rotated: Tensor, position_ids: Tensor) -> PreparedRotation:
        """What turns back by `position_ids`, made once for all that this forward rotated."""
        known = self._seen.get(rotated.device)
        if known is not None and known[0] is position_ids and known[1] is rotated.dtype:
            return known[2]
        kind = torch.promote_types(rotated.dtype, torch.float32)
        back = self._by_row_ahead(kind, position_ids) if rotated.is_cpu and rotated.shape[2] == 1 else None
        if back is None:
            back = self._way_back(rotated.to(kind), position_ids)
        self._seen[rotated.device] = (position_ids, rotated.dtype, back)
        return back

    def way_back_by_kernel(self, rotated: Tensor, position_ids: Tensor) -> PreparedRotation | None:
        """As `way_back`, where all rows of the batch turn alike and the kernels know how; else `None`."""
        if not self._by_kernel:
            return None
        back = self.way_back(rotated, position_ids)
        cosine = back.cosine
        return back if cosine.shape[0] == 1 and cosine.dtype is torch.float32 else None

    def _by_row_ahead(self, kind: torch.dtype, position_ids: Tensor) -> PreparedRotation | None:
        """What turns a decoded token back, from the ways of `AHEAD` coming positions that one call of the model's module gave; `None` where
        frequencies may change meanwhile, or rows of the batch stand at different positions."""
        if not self._fixed or not self._by_kernel or not position_ids.is_cpu or position_ids.shape[1] != 1:
            return None
        positions = position_ids.view(-1).tolist()
        position = int(positions[0])
        if positions.count(position) != len(positions):
            return None
        ahead = self._ahead.get(kind)
        if ahead is None or not ahead[0] <= position < ahead[0] + AHEAD:
            with torch.inference_mode(False), torch.no_grad():  # they serve later forwards too, of any mode
                coming = torch.arange(position, position + AHEAD)[None]
                ahead = (position, self._way_back(torch.empty(0, dtype=kind), coming))
            self._ahead[kind] = ahead
        return ahead[1].row(position - ahead[0])

    def _way_back(self, like: Tensor, position_ids: Tensor) -> PreparedRotation:
        """What turns back by `position_ids`, without the factor that a rotation and its inverse leave."""
        found = self._as_seen(like, position_ids.to(like.device), **self._arguments)
        # a model on several devices has one rotary module for all
        cos, sin = (table.to(like.device) for table in found)
        # the module may scale (YaRN), and does so again later; in fp64 its fp32 cosines are not quite on the unit circle
        scale = cos.square() + sin.square()
        cos, sin = cos / scale, sin / scale
        if self._by_kernel:
            cos, sin = self._both(cos)[:, None], self._both(sin)[:, None]
        return PreparedRotation(cos, sin, inverse=True)

    def _both(self, table: Tensor) -> Tensor:
        """Cosines or sines for both halves of a head."""
        return torch.cat([table, table], dim=-1) if self._halves else table

    def tables(self, like: Tensor, places: int) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines `[at least places, rotary_dim]` by which `kvpress.kernels` turn rows of the type of `like`; `None` where this
        rotation is none that they know."""
        if not self._by_kernel:
            return None
        asked, last = (places, like.dtype, like.device), self._last
        if last is not None and last[0] == asked:
            return last[1]
        found = self._table(like, places)
        self._last = (asked, found)
        return found

    def rotate_last(self, plain: Tensor, places: int) -> Tensor:
        """`plain [batch, heads, 1, dim]` rotated to the last of `places` positions."""
        if not self._by_kernel:
            last = torch.full((plain.shape[0], 1, 1), places - 1, device=plain.device)
            return self.rotate(plain, last)
        cos, sin = self._table(plain, places)
        return turn(plain, cos[None, None, places - 1 : places], sin[None, None, places - 1 : places])

    def rotate(self, plain: Tensor, positions: Tensor) -> Tensor:
        """`plain [batch, heads, tokens, dim]` rotated to `positions [batch, heads or 1, tokens]`; negative ones count as 0."""
        batch, heads, tokens, dim = plain.shape
        if self._follows_length and positions.shape[0] > 1:  # each row is a text of its own length
            return torch.cat([self.rotate(row[None], at[None]) for row, at in zip(plain, positions, strict=True)])
        positions = positions.clamp(min=0).long()
        cos, sin = self._table(plain, int(positions.max()) + 1)
        if self._by_kernel:
            return turn(plain, cos, sin, positions=positions)
        cos, sin = cos[positions], sin[positions]
        wide = plain.to(cos.dtype)
        if positions.shape[1] == 1:
            return self._rotate(wide, cos[:, 0], sin[:, 0]).to(plain.dtype)
        cos, sin = cos.flatten(0, 1), sin.flatten(0, 1)
        turned = self._rotate(wide.reshape(batch * heads, 1, tokens, dim), cos, sin)
        return turned.view(batch, heads, tokens, dim).to(plain.dtype)

    def _table(self, like: Tensor, needed: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions 0 … at least `needed - 1`, `[positions, width]` each; for the kernels of both halves."""
        if self._follows_length:  # frequencies as for a text of just this length
            size = needed if needed > self._trained else min(TABLE, self._trained)
        else:
            size = max(TABLE, 1 << (needed - 1).bit_length())
        kind = torch.promote_types(like.dtype, torch.float32)
        key = (size, like.device, kind)
        table = self._tables.get(key)
        if table is None:
            module = copy.deepcopy(self._reindexed).to(like.device) if self._follows_length else self._reindexed
            probe = torch.empty(0, dtype=kind, device=like.device)
            cos, sin = module(probe, torch.arange(size, device=like.device)[None], **self._arguments)
            if len(self._tables) >= TABLES:
                self._tables.clear()
            cos, sin = cos[0].to(like.device), sin[0].to(like.device)
            if self._by_kernel:
                cos, sin = self._both(cos), self._both(sin)
            table = self._tables[key] = (cos, sin)
        return table

    def _rotate(self, plain: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        width = cos.shape[-1] * (2 if self._halves else 1)  # partial rotary: the rest passes
        part = plain[..., :width]
        turned, _ = self._apply(part, part[:, :0], cos, sin)  # no keys beside the queries
        return turned if width == plain.shape[-1] else torch.cat([turned, plain[..., width:]], dim=-1)

    def _check(self, model: PreTrainedModel) -> None:
        """A key depends on its token's hidden state and its rotation alone: equal states at three positions must give equal keys once the
        rotation is undone, and the model's own keys when it is done again."""
        module = _first_attention(model)
        weight = next(module.parameters())
        state = torch.randn(
            1, 1, model.config.get_text_config(decoder=True).hidden_size, generator=torch.Generator().manual_seed(0)
        )
        states = state.expand(1, 3, -1).to(weight)
        ids = torch.arange(3, device=weight.device)[None]
        trial = copy.deepcopy(self._as_seen)
        cos, sin = trial(states, ids, **self._arguments)
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        with torch.no_grad():
            given = {"hidden_states": states, "position_embeddings": (cos, sin), "attention_mask": None}
            module(**given, **passed(module, cache))
        layer: Any = cache.layers[int(module.layer_idx)]  # type: ignore[arg-type]
        keys: Tensor = layer.keys
        error = torch.inf
        trials = ((kernel, halves) for halves in (False, True) for kernel in (True, False))
        for self._by_kernel, self._halves in trials:
            if cos.shape[-1] * (2 if self._halves else 1) > keys.shape[-1]:
                continue
            try:
                self._seen.clear()
                self._ahead.clear()
                self._tables.clear()
                self._last = None
                plain = self.undo(keys.double(), ids)
                again = self.rotate(plain, ids[:, None]) - keys.double()
            except (RuntimeError, ValueError):  # cosines of another width than this trial takes
                continue
            error = max(float((plain - plain[:, :, :1]).abs().max()), float(again.abs().max())) / float(
                keys.abs().max()
            )
            if error < 50 * torch.finfo(keys.dtype).eps:
                return
        raise UnsupportedModelError(
            f"the rotation of model type {model.config.model_type!r} could not be undone (relative error {error:.1e}): "
            "positions='reindex' cannot serve it"
        )


def _first_attention(model: PreTrainedModel) -> torch.nn.Module:
    """The attention of the first full-attention layer."""
    config = model.config.get_text_config(decoder=True)
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    wanted = types.index("full_attention")
    for module in model.modules():
        if getattr(module, "layer_idx", None) == wanted and "attention" in type(module).__name__.lower():
            return module
    raise UnsupportedModelError(f"model type {model.config.model_type!r} has no attention module for layer {wanted}")
