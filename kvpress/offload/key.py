"""The name of a block: what it holds, never only where it lies."""

import hashlib
import json
from dataclasses import dataclass, field

FORMAT_VERSION = 1
MAX_CONTEXT_CHARACTERS = 4096


@dataclass(frozen=True)
class BlockKey:
    """Everything that decides the bytes of one block of up to `block` slots of one layer of one cache.

    Args:
        cache: identity of the cache that wrote the block, unique for each cache object.
        layer: layer index, >= 0.
        block: index of the block in its layer, >= 0.
        generation: raised each time the block's contents are rewritten, since blocks are immutable.
        context: model and revision, policy, rope and layout as one text; part of the identity.
    """

    cache: str
    layer: int
    block: int
    generation: int = 0
    context: str = ""
    digest: str = field(init=False, repr=False, compare=False)
    _description: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("cache", "context"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"{name} must be a string, got {value!r}")
            if len(value) > MAX_CONTEXT_CHARACTERS:
                raise ValueError(f"{name} must have at most {MAX_CONTEXT_CHARACTERS} characters, got {len(value)}")
        for name in ("layer", "block", "generation"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        names = ("cache", "layer", "block", "generation", "context")
        fields = {name: getattr(self, name) for name in names} | {"format": FORMAT_VERSION}
        description = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        object.__setattr__(self, "_description", description)
        object.__setattr__(self, "digest", hashlib.sha256(description.encode()).hexdigest())

    def description(self) -> str:
        """The canonical JSON text of the key; its sha256 is `digest`, which names the file."""
        return self._description
