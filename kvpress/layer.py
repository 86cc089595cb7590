"""PolicyLayer: one layer's way through a forward: append, attend, observe, evict."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvpress.decode_step import AttentionCall, DecodeStep
from kvpress.errors import CacheStateError
from kvpress.forward import Forward
from kvpress.keeper import Keeper
from kvpress.masks import LogicalLength
from kvpress.observation import AttentionArguments
from kvpress.policies.token_rule import token_rule
from kvpress.precision import own_precision
from kvpress.reading import Reader
from kvpress.rope import Rotation
from kvpress.row_format import RowFormat
from kvpress.slots import SlotTable
from kvpress.table_attention import attend_table
from kvpress.tensor_parallel import HeadShards
from kvpress.token_ids import TokenIds
from kvpress.tokens import TokenClock, Tokens
from kvpress.waiting import WaitingForward

if TYPE_CHECKING:
    from kvpress.offload.stowage import Stowage
    from kvpress.policies.base import EvictionPolicy
    from kvpress.policies.selection import Selector


class PolicyLayer(CacheLayerMixin):
    """The slots of one full-attention layer under an eviction policy.

    Args:
        policy: what stays.
        layer_idx: index of the layer in the model.
        ordinal: index among the compressed layers.
        layers: number of compressed layers.
        clock: shared by the layers of a cache.
        reader: where slots are selected, or positions re-indexed.
        token_ids: tells the ids of a forward's tokens, for policies that need them.
        form: how keys and values are stored.
        expands_keys: the model makes other keys of what `update` returns before it attends (latents): always return all of them.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False
    stowage: Stowage | None = None  # with offload: where keys and values lie between forwards

    def __init__(
        self,
        policy: EvictionPolicy,
        layer_idx: int,
        ordinal: int,
        layers: int,
        clock: TokenClock,
        *,
        expands_keys: bool = False,
        reader: Reader | None = None,
        token_ids: TokenIds | None = None,
        form: RowFormat | None = None,
    ) -> None:
        self.form = form
        self.policy = policy
        self.layer_idx = layer_idx
        self.ordinal = ordinal
        self.layers = layers
        self.clock = clock
        self.expands_keys = expands_keys
        self.reader = reader
        self.token_ids = token_ids
        self.keeper = Keeper(policy, layer_idx, ordinal, layers, expands_keys=expands_keys, reader=reader)
        evicts_one = policy.budget is not None and policy.interval == 1 and reader is None and not expands_keys
        self.token_rule = token_rule(policy) if evicts_one else None
        self._keeps_all = policy.budget is None and not policy.columns and token_ids is None and not expands_keys
        self._lends = False  # layers without keys of their own attend to these slots
        self.attended = True  # our attention function follows every update
        self.reset()

    def reset(self) -> None:
        """Forget everything but the parameters."""
        self.table = SlotTable(self.policy.columns, self.form)
        if self.stowage is not None:
            self.stowage.begin(self.table)
        self.keeper.reset(self.table)
        self.is_initialized = False
        self.seen = 0
        self.seen_rows: tuple[int, ...] = ()  # real tokens of each batch row
        self.record_past = False
        self.forward: Forward | DecodeStep | None = None  # appended, not yet attended to
        self.step: DecodeStep | None = None  # of decoded tokens that need not go the whole way
        self._waiting: WaitingForward | None = None  # for `crop`
        if self.reader is not None:
            self.reader.reset()

    def share_heads(self, heads: HeadShards) -> None:
        """This process holds some of the layer's KV heads."""
        self.keeper.heads = heads
        if self.reader is not None:
            self.reader.heads = heads

    # -- the contract of a transformers layer --------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the first tokens bring their sizes."""

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.seen

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """For our mask function the logical length; for a stock one the slots that `update` will return, and the offset that makes the
        last of them the newest."""
        if self.attended:
            return LogicalLength(self.seen + query_length), 0
        held = int(self.table.held.max(initial=0))
        return held + query_length, self.seen - held

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """Keys of the slots in use, or `None`."""
        return self.table.dense()[0] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """Values of the slots in use, or `None`."""
        return self.table.dense()[1] if self.is_initialized else None

    @property
    def batch_size(self) -> int:
        """Batch rows, -1 before the first tokens."""
        return len(self.seen_rows) if self.is_initialized else -1

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens `[batch, kv_heads, rows, dim]`, and return what attention shall read.

        Raises:
            CacheStateError: an earlier forward broke off before its attention ended.
            ValueError: another batch size than the cache's.
        """
        self.commit()
        if self.forward is not None:
            raise CacheStateError(
                f"layer {self.layer_idx}: an earlier forward broke off before its attention ended. Call cache.reset() and start again"
            )
        if self.stowage is not None:
            self.stowage.check_whole()
        batch, _, rows, _ = key_states.shape
        ids = None if self.token_ids is None else self.token_ids.read(batch, rows, key_states.device)
        if not self.is_initialized:
            self.seen_rows = (0,) * batch
            self.is_initialized = True
        elif batch != len(self.seen_rows):
            raise ValueError(f"batch size must stay {len(self.seen_rows)}, the cache's, got {batch}")
        if self.stowage is not None:
            self.stowage.selecting = self._reads_some(rows)
        keys, values = key_states.detach(), value_states.detach()
        # under autocast a rotation widens keys, and stock attention narrows them again
        if keys.dtype != values.dtype and not self.expands_keys:
            keys = keys.to(values.dtype)
        new = self.table.append(keys, values)
        self.seen += rows
        self.forward = forward = Forward(weakref.ref(self), rows, new, keys, self.seen_rows, token_ids=ids)
        if self.attended and not self.expands_keys:
            if rows == 1:
                forward.prepared, forward.count = self.table.prepared, self.table.count
            if forward.prepared is None and self.table.has_layout:
                forward.slots = self.table.readable()
        if self.table.base or forward.prepared is not None or forward.slots is not None:
            return key_states, value_states  # attention reads the table itself
        keys, values = self.table.dense()
        if not self.attended:
            self.place(self.forward, None, keys.device)
            self.finish(self.forward, None, keys, AttentionArguments(1.0))
        return keys, values

    def _reads_some(self, rows: int) -> bool:
        """Whether only selected slots are read, and nothing has to be known of the others."""
        if rows > 1 or self.selector is None or not self.attended:
            return False
        return self._keeps_all and self.selector.narrows(self.table.count + 1)

    def take_in(self, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
        """Fill an empty layer with tokens `[batch, kv_heads, tokens, dim]` that another cache has seen, without their queries."""
        self.update(keys, values)
        if self.forward is None:
            return
        forward, self.forward = self.running, None
        self.place(forward, mask, keys.device)
        self.keeper.adopt(forward)
        self._stow(forward.rows)

    @property
    def full_nbytes(self) -> int:
        """Bytes that keys and values of every token seen would take."""
        return self.seen * self.table.full_bytes_per_token

    def activate_past_recording(self) -> None:
        """From now on eviction waits for the `crop` that follows each forward, so that `crop` is exact.

        Raises:
            CacheStateError: with offload, where something is evicted: all layers would have to stay near until then.
        """
        if self.stowage is not None and (self.policy.budget is not None or self.policy.columns):
            raise CacheStateError(
                f"offload must be None to take tokens back from policy {self.policy.name!r}, which evicts (assisted decoding)"
            )
        self.record_past = True
        if self.policy.budget is not None:
            self.step = None

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens, as if they had never come.

        Raises:
            ValueError: a positive number.
            CacheStateError: more than can be taken back exactly.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be <= 0 (minus the tokens to take back), got {tokens_to_remove}")
        removed = -tokens_to_remove
        if self._waiting is not None:
            self._crop_waiting(self._waiting, removed)
        elif removed:
            if self.keeper.evictions or self.table.column_names or self.keeper.recent is not None:
                raise CacheStateError(
                    f"crop({tokens_to_remove}) would need evicted tokens or earlier scores back: call activate_past_recording() "
                    "before the forward that may be taken back"
                )
            self._take_back(removed)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row `i` becomes what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows `indices`."""
        self.commit()
        if not self.is_initialized:
            return
        if indices.dtype == torch.bool:
            indices = indices.nonzero().view(-1)
        self.table.select_batch(indices)
        if self.selector is not None:
            self.selector.select_batch(indices)
        rows = indices.tolist()
        self.seen_rows = tuple(self.seen_rows[row] for row in rows)
        self.keeper.select_batch(indices, rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row `repeats` times."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(len(self.seen_rows)).repeat_interleave(repeats))

    def state(self) -> dict[str, Any]:
        """Everything from which `load_state` makes an equal layer."""
        return {
            "table": self.table.state(),
            "seen": self.seen,
            "seen_rows": self.seen_rows,
            **self.keeper.state(),
            "record_past": self.record_past,
            "selection": None if self.selector is None else self.selector.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.reset()
        self.table.load_state(state["table"])
        self.is_initialized = True
        for name in ("seen", "seen_rows", "record_past"):
            setattr(self, name, state[name])
        self.keeper.load_state(state)
        if self.selector is not None:
            self.selector.load_state(state["selection"])

    # -- one forward ---------------------------------------------------------------------------------------------------

    @property
    def running(self) -> Forward:
        """The forward between `update` and the end of its attention.

        Raises:
            CacheStateError: none is running.
        """
        if not isinstance(self.forward, Forward):
            raise CacheStateError(f"layer {self.layer_idx}: no forward is running")
        return self.forward

    def place(self, forward: Forward, mask: Tensor | None, device: torch.device, ids: Tensor | None = None) -> Tokens:
        """Give the tokens of a forward their positions, now that the padding mask is known.

        Args:
            mask: `[batch, 1, 1, tokens seen]` bool, `False` for padding.
            ids: `[batch or 1, rows]` positions to which the model rotated the new keys.
        """
        if self.ordinal == 0:
            self.clock.clear()
        tokens = self.clock.read(forward.before, forward.rows, mask, device)
        self.table.place(forward.new, tokens.positions, tokens.counts)
        forward.tokens = tokens
        if self.table.has_empty or (self.reader is not None and self.table.rows is not None):
            forward.visible = self.table.positions
        self.seen_rows = tokens.seen
        given = ids
        if self.rotation is not None:
            if self.ordinal == 0:
                self.rotation.begin()
            ids = tokens.positions.clamp(min=0) if ids is None or ids.dim() != 2 else ids
            forward.rotated_to = self.clock.same_ids(ids)
            buffer, slot = self.table.place_of_key(forward.new)
            if buffer is None or not self.rotation.undo_in_place(buffer, slot, forward.new_keys, forward.rotated_to):
                self.table.write_keys(forward.new, self.rotation.undo(forward.new_keys, forward.rotated_to))
        if self.ordinal == 0:
            self.clock.note(mask, given, forward.before, tokens, forward.rotated_to)
        return tokens

    @property
    def selector(self) -> Selector | None:
        """The selection's state in this layer."""
        return None if self.reader is None else self.reader.selector

    @property
    def rotation(self) -> Rotation | None:
        """Where keys are stored before rotation: what undoes and does it."""
        return None if self.reader is None else self.reader.rotation

    def attend(
        self, forward: Forward, query: Tensor, keys: Tensor, values: Tensor, arguments: AttentionArguments
    ) -> Tensor:
        """Attention of a forward's rows over the slots: `[batch, query_heads, rows, value_dim]`."""
        if self.reader is not None:
            if self.rotation is not None:
                query = self.rotation.undo(query, forward.rotated)
            if forward.prepared is not None:
                return self.reader.read_one(self.table, forward, query, arguments)
            whole = (keys, values) if self.expands_keys or self.table.base else self.table.views()
            return self.reader.read(self.table, forward, query, *whole, arguments)
        return attend_table(
            self.table, forward, query, keys, values, arguments, self.policy.weights_reduction, self.expands_keys
        )

    def finish(self, forward: Forward, query: Tensor | None, keys: Tensor, arguments: AttentionArguments) -> None:
        """The end of a forward: the policy observes, and evicts what exceeds the budget; while past is recorded, at `crop`."""
        self.forward = None
        if self.ordinal == self.layers - 1:
            self.clock.clear()
        if self.record_past and (self.policy.budget is not None or self.policy.columns):
            self._waiting = WaitingForward(forward, None if query is None else query.detach(), keys.detach(), arguments)
        else:
            self.keeper.keep(forward, query, keys, arguments)
            self._stow(forward.rows)

    def prepare_step(self, forward: Forward, call: AttentionCall) -> None:
        """Tokens like that of `forward`, which `call` just attended to, may go by a step, where all stay or the policy has a rule."""
        simple = self._keeps_all or (self.token_rule is not None and not self.record_past)
        if self.step is None and forward.rows == 1 and simple and self.ordinal > 0 and not self._lends:
            self.step = DecodeStep.after(self, forward, call)

    def lend(self) -> None:
        """A layer without keys of its own attended to these slots: it needs the `Forward` that a step has not."""
        self._lends, self.step = True, None

    def took_step(self, tokens: Tokens, index: Tensor | None) -> None:
        """A token went by `step`, and attended to the slots `index`."""
        self.forward = None
        self.seen_rows = tokens.seen
        self.keeper.decoded += 1
        if self.reader is not None:
            self.reader.note(self.table, index)
        if self.ordinal == self.layers - 1:
            self.clock.clear()

    def _stow(self, rows: int) -> None:
        if self.stowage is not None:
            selected = [] if self.reader is None else self.reader.tensors()
            of_step = [] if self.step is None else self.step.tensors()
            self.stowage.stow(self.table, rows, (*self.keeper.tensors(), *selected, *of_step))

    def commit(self) -> None:
        """End a forward that waited for a `crop` which did not come."""
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            self._keep_of(waiting)

    def _keep_of(self, waiting: WaitingForward) -> None:
        """The end of a forward outside of its attention, wherever that is called."""
        with own_precision(waiting.keys.device):
            self.keeper.keep(*waiting, taken_back=self.record_past)

    # -- taking back ---------------------------------------------------------------------------------------------------

    def _crop_waiting(self, waiting: WaitingForward, removed: int) -> None:
        """The forward that waits loses its last tokens; what is left of it is observed and evicted from."""
        rows = waiting.forward.rows
        if removed > rows:
            raise CacheStateError(f"cannot take back {removed} tokens, the last forward had {rows}")
        self._waiting = None
        self._take_back(removed)
        if removed < rows:
            self._keep_of(waiting.without(removed, self.seen_rows, self.table))

    def _take_back(self, removed: int) -> None:
        if removed > self.seen:
            raise CacheStateError(f"cannot take back {removed} tokens, {self.seen} were seen")
        before = self.table.held[:, 0].copy()
        self.table.drop_last(removed)
        if removed and self.selector is not None:
            self.selector.crop(self.table.count)
        lost = before - self.table.held[:, 0]
        self.seen -= removed
        self.seen_rows = tuple(seen - int(gone) for seen, gone in zip(self.seen_rows, lost, strict=True))
        if self.seen == 0:
            recording = self.record_past
            self.reset()
            self.record_past = recording
