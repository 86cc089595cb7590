"""PolicyCache: a transformers cache that keeps what a policy says."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel

import kvpress.attention  # noqa: F401  registers the attention and mask functions under their name
from kvpress.assembly import Policies, make_layers, use_our_attention
from kvpress.choice import choose_policies
from kvpress.delegates import NAME
from kvpress.errors import CacheStateError, UnsupportedModelError
from kvpress.forward import hand_over
from kvpress.layer import PolicyLayer
from kvpress.memory import held_bytes
from kvpress.offload.attached import Attached, attach
from kvpress.offload.options import Offload
from kvpress.placement import one_device
from kvpress.policies.base import Policy
from kvpress.report import CacheReport, make_report
from kvpress.row_format import RowFormat, row_format
from kvpress.tensor_parallel import ALONE, head_shards

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PolicyChoice = Policy | str | Sequence[Policy]


class PolicyCache(Cache):
    """A key-value cache for `model.generate(..., cache=cache)` that keeps in memory only what its policy keeps.

    Making one sets the model's attention implementation to `"kvpress"` (once, by the public `set_attn_implementation`); the model goes on
    to serve any other cache through its former implementation.

    Args:
        model: a decoder model of transformers. It must have been loaded before; weights are not touched.
        policy: an instance, a registered name with its parameters, or a list with at most one eviction and one selection policy.
        kv_dtype: `"bfloat16"`, `"float16"` or `"int8"` to store keys and values in that type (int8 with a scale per token and KV head),
            under any policy; scores and arithmetic stay as they are. `None` for the model's own type.
        offload: limits of device memory, host memory and disk; what does not fit near moves down.
        tensor_parallel: the processes that share the KV heads of each layer, where the model does not know them. One that transformers
            loaded with a `tp_plan` does. What is decided over all heads of a layer is then decided alike in all processes.
        parameters: of a policy given by name.

    Raises:
        ValueError: an unknown policy or parameter, or a value that breaks a rule.
        UnsupportedModelError: a model that cannot be served rightly.

    Example:
        cache = PolicyCache(model, "snapkv", budget=1024)
        out = model.generate(**inputs, cache=cache, max_new_tokens=256)
        print(cache.report())
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: PolicyChoice,
        *,
        kv_dtype: str | None = None,
        offload: Offload | None = None,
        tensor_parallel: ProcessGroup | None = None,
        **parameters: Any,
    ) -> None:
        self.form = row_format(kv_dtype)
        policies = choose_policies(policy, parameters).for_model(model)
        config = model.config.get_text_config(decoder=True)
        layers = make_layers(config, policies, model, self.form)
        self.heads = head_shards(model, tensor_parallel, policies)
        for layer in layers:
            if isinstance(layer, PolicyLayer):
                layer.share_heads(self.heads)
        if offload is not None:
            self.tiers = attach(layers, offload, one_device(model))
        if config._attn_implementation != NAME:
            use_our_attention(model, config)
        self._fill(config, policies, layers)

    tiers: Attached | None = None  # with offload
    form: RowFormat  # how keys and values are stored
    heads = ALONE  # of each layer, that this process holds

    @property
    def kv_dtype(self) -> str | None:
        """The type in which keys and values are stored, `None` for the model's own."""
        return self.form.name

    @classmethod
    def from_config(
        cls, config: PreTrainedConfig, policy: PolicyChoice, *, kv_dtype: str | None = None, **parameters: Any
    ) -> Self:
        """A cache made without a model, for policies that need no queries.

        The model's attention is left as it is. Under a stock implementation (`"sdpa"`, `"eager"`, …) an evicting cache serves one row
        without padding, since a stock attention shows the cache no padding mask; under `"kvpress"` there is no such limit.

        Raises:
            ValueError: as the constructor; also a policy that needs queries while the configuration names a stock attention.
        """
        policies = choose_policies(policy, parameters)
        text_config = config.get_text_config(decoder=True)
        if policies.reindex:
            raise ValueError("positions='reindex' needs the model's rotary module: use PolicyCache(model, policy)")
        if policies.eviction.needs_token_ids:
            raise ValueError(
                f"policy {policies.eviction.name!r} needs token ids, which only a model shows: use PolicyCache(model, policy)"
            )
        implementation, refusal = text_config._attn_implementation, policies.stock_refusal
        if refusal is not None and implementation != NAME:
            raise ValueError(f"{refusal}, got {implementation!r}: use PolicyCache(model, policy)")
        cache = cls.__new__(cls)
        cache.form = row_format(kv_dtype)
        cache._fill(text_config, policies, make_layers(text_config, policies, None, cache.form), any_attention=True)
        return cache

    @classmethod
    def from_cache(
        cls,
        model: PreTrainedModel,
        policy: PolicyChoice,
        cache: Cache,
        attention_mask: Tensor | None = None,
        **parameters: Any,
    ) -> Self:
        """A cache that takes over the keys and values of a filled stock cache.

        A policy that needs no queries evicts at once; one that needs queries starts to score with the next forward, and evicts at its end.

        Args:
            cache: a `DynamicCache` or alike that holds every token it has seen.
            attention_mask: `[batch, tokens]`, where the batch was padded.

        Raises:
            ValueError: a layer of another type, or one that does not hold all tokens it has seen.
        """
        taken = cls(model, policy, **parameters)
        if taken.policies.eviction.needs_token_ids:
            raise ValueError(
                f"policy {taken.policies.eviction.name!r} needs the ids of all tokens, the given cache has none: feed the text again"
            )
        padding = None if attention_mask is None else attention_mask.bool()[:, None, None]
        sources: list[Any] = cache.layers
        for index, (layer, source) in enumerate(zip(taken.layers, sources, strict=True)):
            if not isinstance(layer, PolicyLayer):
                taken.layers[index] = copy.deepcopy(source)
                continue
            keys, values = source.keys, source.values
            if keys is None or keys.shape[2] != source.get_seq_length():
                held = 0 if keys is None else keys.shape[2]
                raise ValueError(
                    f"layer {index} of the cache must hold all {source.get_seq_length()} tokens it has seen, it holds {held}"
                )
            layer.take_in(keys, values, padding)
        return taken

    def _fill(
        self, config: PreTrainedConfig, policies: Policies, layers: list[Any], any_attention: bool = False
    ) -> None:
        super().__init__(layers=layers)
        self.policies = policies
        self.config = config
        self._any_attention = any_attention
        self.policy_layers = [layer for layer in layers if isinstance(layer, PolicyLayer)]

    # -- the contract of a transformers cache --------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append a forward's keys and values `[batch, kv_heads, tokens, dim]`; returns what attention shall read."""
        layer: Any = self.layers[layer_idx]
        if not isinstance(layer, PolicyLayer):
            updated: tuple[Tensor, Tensor] = layer.update(key_states, value_states, *args, **kwargs)
            return updated
        first = self.policy_layers[0]
        if layer is first:
            self._check_attention(key_states.shape[0])
            self.heads.check(key_states.shape[1], self.config)
        elif layer.seen + key_states.shape[2] != first.seen:
            raise CacheStateError(
                f"layer {layer_idx} has seen {layer.seen} tokens, layer {first.layer_idx} had seen "
                f"{first.seen - key_states.shape[2]}: an earlier forward broke off. Call cache.reset() and start again"
            )
        if layer.step is not None and layer.step.take(layer, key_states, value_states):
            hand_over(layer.step, key_states)
            return key_states, value_states
        keys, values = layer.update(key_states, value_states)
        if layer.forward is not None:
            hand_over(layer.forward, keys)
        return keys, values

    def _check_attention(self, batch: int) -> None:
        implementation = self.config._attn_implementation
        attended = implementation == NAME
        if not attended and not self._any_attention:
            raise UnsupportedModelError(
                f"attention implementation must stay {NAME!r} while a PolicyCache is in use, it was changed to {implementation!r}: "
                f"call model.set_attn_implementation({NAME!r})"
            )
        refusal = None if attended else self.policies.stock_refusal
        if refusal is not None:
            raise UnsupportedModelError(f"{refusal}, got {implementation!r}: use PolicyCache(model, policy)")
        if not attended and batch > 1 and self.policies.eviction.budget is not None:
            raise UnsupportedModelError(
                f"batch must be 1 under the attention implementation {implementation!r}, got {batch}: it does not show "
                "padding to the cache. Use PolicyCache(model, policy)"
            )
        for layer in self.policy_layers:
            layer.attended = attended

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Sizes from which transformers makes its mask; for a compressed layer in logical coordinates."""
        if layer_idx == self.policy_layers[0].layer_idx:
            self._check_attention(1)
        return super().get_mask_sizes(query_length, layer_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens of every layer, exactly.

        Raises:
            CacheStateError: tokens that were evicted for them are gone; `activate_past_recording()` first.
            TierError: with offload, what was to come back from the tiers did not: the cache must be reset.
        """
        with self._on_all_layers():
            super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Batch row `i` of every layer becomes what row `beam_idx[i]` was; as `batch_select_indices`."""
        with self._on_all_layers():
            super().reorder_cache(beam_idx)  # type: ignore[arg-type]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows `indices` of every layer.

        Raises:
            TierError: with offload, there is no room for them: the cache must be reset.
        """
        with self._on_all_layers():
            super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row `repeats` times, in every layer; as `batch_select_indices`."""
        with self._on_all_layers():
            super().batch_repeat_interleave(repeats)

    @contextmanager
    def _on_all_layers(self) -> Iterator[None]:
        """For what all layers do in turn: what they make then is written to later, in either mode."""
        tiers = nullcontext() if self.tiers is None else self.tiers.all_or_none()
        with torch.inference_mode(False), torch.no_grad(), tiers:
            yield

    # -- inspection ----------------------------------------------------------------------------------------------------

    @property
    def seen_tokens(self) -> int:
        """Tokens seen so far, padding included."""
        return self.policy_layers[0].seen

    @property
    def nbytes(self) -> int:
        """Bytes of the storages really held in memory, all layers; with offload also working memory and blocks in the memory tiers."""
        tiers = 0 if self.tiers is None else self.tiers.nbytes
        return tiers + held_bytes(tensor for layer in self.layers for tensor in _tensors(layer))

    @property
    def full_nbytes(self) -> int:
        """Bytes that a full cache would hold now: every token seen, keys and values, and the other layers as they are."""
        total = held_bytes(t for layer in self.layers if not isinstance(layer, PolicyLayer) for t in _tensors(layer))
        return total + sum(layer.full_nbytes for layer in self.policy_layers)

    def kept_positions(self, layer_idx: int) -> Tensor:
        """Original positions of the tokens that a layer keeps: `[batch, kv_heads, slots]` int64, ascending, `-1` for empty slots.

        A position counts the tokens of its own row, padding excluded.

        Raises:
            ValueError: a layer that is not compressed.
        """
        return self._compressed(layer_idx).table.kept_positions()

    def selected_positions(self, layer_idx: int) -> Tensor:
        """Original positions that the last rows of the last forward attended to, sinks and local window included.

        `[batch, n]` where all KV heads attend to the same tokens, else `[batch, kv_heads, n]`; int64, ascending, `-1` for empty.

        Raises:
            ValueError: a layer that is not compressed, or a cache without a selection policy.
        """
        reader = self._compressed(layer_idx).reader
        if reader is None:
            raise ValueError(
                "selected_positions needs a selection policy, this cache has none: it attends to all it keeps"
            )
        return reader.read_positions()

    def _compressed(self, layer_idx: int) -> PolicyLayer:
        layer = next((layer for layer in self.policy_layers if layer.layer_idx == layer_idx), None)
        if layer is None:
            raise ValueError(
                f"layer_idx must be one of {[layer.layer_idx for layer in self.policy_layers]}, got {layer_idx!r}"
            )
        return layer

    def report(self) -> CacheReport:
        """What was seen, kept and evicted, and the bytes of it; prints as a table, `.to_dict()` gives JSON types."""
        return make_report(self)

    # -- keeping it ----------------------------------------------------------------------------------------------------

    def save(self, directory: str | Path) -> None:
        """Write the cache to a new or empty directory (`kvpress.storage` describes the files)."""
        from kvpress.storage import save_cache

        save_cache(self, Path(directory))

    @classmethod
    def load(cls, directory: str | Path, model: PreTrainedModel) -> PolicyCache:
        """Read a saved cache for `model`.

        Raises:
            CacheFormatError: damaged files, another format, or a model of another configuration; names the field.
        """
        from kvpress.storage import load_cache

        return load_cache(Path(directory), model)

    def close(self) -> None:
        """Empty the cache and, with offload, free its tiers: threads, memory and files. It serves no forward any more then."""
        for layer in self.layers:
            layer.reset()
        if self.tiers is not None:
            self.tiers.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> PolicyCache:
        if self.tiers is not None:
            memo[id(self.tiers)] = self.tiers.fork()
        memo[id(self.config)] = self.config  # the model's own, whose attention implementation is watched
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        with torch.inference_mode(False), torch.no_grad():  # the copy is written to later, in either mode
            for name, value in self.__dict__.items():
                setattr(copied, name, copy.deepcopy(value, memo))
        for layer in copied.policy_layers:
            if layer.stowage is not None:
                layer.stowage.bind(layer.table)
        return copied

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a PolicyCache is not pickled: use cache.save(directory) and PolicyCache.load(directory, model)"
        )

    def __repr__(self) -> str:
        return f"PolicyCache({self.policies}, seen={self.seen_tokens}, bytes={self.nbytes})"


def layer_nbytes(layer: Any) -> int:
    """Bytes of the storages that a layer holds, of any class."""
    return held_bytes(_tensors(layer))


def _tensors(layer: Any) -> list[Tensor]:
    """Every tensor that a layer holds."""
    if isinstance(layer, PolicyLayer):
        selected = [] if layer.selector is None else layer.selector.tensors()
        return [tensor for tensor in (*layer.table.tensors(), *layer.keeper.tensors(), *selected) if tensor is not None]
    found: list[Tensor] = []
    for value in vars(layer).values():
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        found.extend(item for item in items if isinstance(item, Tensor))
    return found
