"""The token ids of the running forward: hooks on the model, shared by the caches that ask, gone with the last one."""

from __future__ import annotations

import weakref
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpress.errors import MissingTokenIdsError

# One value a thread and context: model calls that interleave in other threads do not see each other's ids.
# The ids are kept by device: a model on several moves them to each once.
_current: ContextVar[tuple[int, dict[torch.device, Tensor]] | None] = ContextVar("kvpress_token_ids", default=None)


class _Watch:
    """The hooks on one model, and how many readers need them."""

    def __init__(self, model: PreTrainedModel) -> None:
        embedding = model.get_input_embeddings()
        body = model.base_model  # what every way of calling the model goes through
        self.readers = 0
        self._handles = [
            body.register_forward_pre_hook(_forget),
            embedding.register_forward_pre_hook(_note),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


_watches: weakref.WeakKeyDictionary[torch.nn.Module, _Watch] = weakref.WeakKeyDictionary()


class TokenIds:
    """Reads the token ids that the running forward of `model` embeds.

    Two forward pre-hooks are set, on the model's input embedding and on its body, when the model's first reader is
    made; they are removed when the last one is gone. A copy is a reader of its own.

    Args:
        model: has `get_input_embeddings()`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)
        embedding = model.get_input_embeddings()
        self._key = id(embedding)
        watch = _watches.get(embedding)
        if watch is None:
            watch = _watches[embedding] = _Watch(model)
        watch.readers += 1
        weakref.finalize(self, _release, weakref.ref(embedding))

    def read(self, batch: int, rows: int, device: torch.device) -> Tensor:
        """Ids `[batch, rows]` of the running forward, on `device`.

        Raises:
            MissingTokenIdsError: the forward embeds no ids of that shape, as under `inputs_embeds`.
        """
        key, held = _current.get() or (0, {})
        ids = next(iter(held.values()), None) if key == self._key else None
        if ids is None or ids.shape != (batch, rows):
            found = "none" if ids is None else f"ids of shape {tuple(ids.shape)}"
            raise MissingTokenIdsError(
                f"input_ids [{batch}, {rows}] are needed by the cache's policy, the model embedded {found}: "
                "call it with input_ids, not with inputs_embeds"
            )
        if device not in held:
            held[device] = ids.to(device)
        return held[device]

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenIds:
        model = self._model()
        if model is None:
            raise ReferenceError("the model of this cache is gone: its cache cannot be copied")
        return TokenIds(model)


def _forget(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
    _current.set(None)


def _note(embedding: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
    if arguments and isinstance(arguments[0], Tensor) and arguments[0].dim() == 2:
        ids = arguments[0].detach()
        _current.set((id(embedding), {ids.device: ids}))


def _release(reference: weakref.ref[torch.nn.Module]) -> None:
    embedding = reference()
    watch = None if embedding is None else _watches.get(embedding)
    if embedding is None or watch is None:
        return
    watch.readers -= 1
    if watch.readers == 0:
        watch.remove()
        del _watches[embedding]
