"""Whether a second thread reads along: on a busy machine the caller would wait for a thread that gets no processor."""

LONGEST = 64  # readings without help before it is tried again
LOSS = 1.25  # times as long as it would have taken alone: less is chance


class Help:
    """After help that cost much more than it brought some readings go without, twice as many each time in a row."""

    def __init__(self) -> None:
        self._pause = self._left = 0

    def is_wanted(self) -> bool:
        """Whether the reading about to begin should have help."""
        self._left -= 1
        return self._left < 0

    def judge(self, files: int, own: int, working: float, waiting: float) -> None:
        """A reading with help has ended.

        Args:
            files: read in all.
            own: those the caller read itself.
            working, waiting: time the caller took for these, and waited for the others.
        """
        alone = working * files / max(own, 1)
        self._pause = min(max(2 * self._pause, 1), LONGEST) if working + waiting > LOSS * alone else 0
        self._left = self._pause
