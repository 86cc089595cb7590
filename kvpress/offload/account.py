"""What the caches that share a manager hold near, and when they give it back."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress

from kvpress.offload.errors import TierClosedError
from kvpress.offload.manager import TierManager


class Account:
    """Bytes of the near tier that one cache holds for tensors of its own."""

    def __init__(self, manager: TierManager) -> None:
        self._manager = manager
        self.held = 0

    def hold(self, nbytes: int) -> bool:
        """Reserve `nbytes`, moving blocks down where needed; False, and nothing reserved, when they cannot be had."""
        if nbytes > 0 and not self._manager.hold(nbytes):
            return False
        self.held += max(nbytes, 0)
        return True

    def release(self, nbytes: int) -> None:
        """Give `nbytes` back."""
        if nbytes > 0:
            self.held -= nbytes
            self._manager.release(nbytes)


class SharedManager:
    """A manager and the caches that use it: the last to leave closes it.

    A cache may be collected at any moment, even while its thread is inside the manager. So a cache that leaves others behind only
    notes that it left; they tidy up when they next come by.
    """

    def __init__(self, manager: TierManager) -> None:
        self.manager = manager
        self._lock = threading.RLock()
        self._users = 0
        self._left: deque[tuple[str, Account]] = deque()

    def join(self) -> Account:
        """One user more, and its account."""
        with self._lock:
            self._users += 1
        return Account(self.manager)

    def leave(self, owner: str, account: Account) -> None:
        """The user `owner` is gone."""
        self._left.append((owner, account))
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if not last:
            return
        if self.manager.is_own_thread(threading.current_thread()):
            threading.Thread(
                target=self.manager.close, name="kvpress-offload-close"
            ).start()  # a thread cannot join itself
        else:
            self.manager.close()
        account.release(account.held)

    def tidy(self) -> None:
        """Free what users left behind."""
        while self._left:
            with suppress(IndexError, TierClosedError):
                owner, account = self._left.popleft()
                account.release(account.held)
                self.manager.drop(owner)
