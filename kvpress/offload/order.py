"""The order in which the blocks of a tier were used."""

from collections import OrderedDict
from collections.abc import Iterator


class UseOrder:
    """Digests of the blocks of one tier, the least recently used first."""

    def __init__(self) -> None:
        self._digests: OrderedDict[str, None] = OrderedDict()

    def touch(self, digest: str) -> None:
        """Make `digest` the most recently used, adding it when it is new."""
        self._digests[digest] = None
        self._digests.move_to_end(digest)

    def remove(self, digest: str) -> None:
        """Take `digest` out; an absent one is no error."""
        self._digests.pop(digest, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._digests)
