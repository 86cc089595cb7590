"""Write the generated blocks of the README, which lie between `<!-- NAME:begin -->` and `<!-- NAME:end -->`.

Run as `make docs`. With `--check` nothing is written and the exit code is 1 when a block is out of step.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

from kvpress.policy_table import policies_markdown

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCKS: dict[str, Callable[[], str]] = {"policies": policies_markdown}


def updated(text: str) -> str:
    """The text with every block written anew.

    Raises:
        ValueError: a block's markers are not there exactly once.
    """
    for name, make in BLOCKS.items():
        pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        found = len(pattern.findall(text))
        if found != 1:
            raise ValueError(f"README must hold the markers of {name!r} once, got {found}")
        block = make()
        text = pattern.sub(lambda match, block=block: f"{match[1]}{block}\n{match[2]}", text)
    return text


def main() -> int:
    """Write or check; returns the exit code."""
    before = README.read_text(encoding="utf-8")
    after = updated(before)
    if "--check" in sys.argv[1:]:
        return int(before != after)
    README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
