"""A long text cut into windows: a prefix that is compressed, and the continuation that is scored."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Window:
    """Token ids of one window; the prefix holds at least one token and the continuation at least one."""

    name: str
    prefix_ids: tuple[int, ...]
    next_ids: tuple[int, ...]


def text_windows(
    text: str, tokenizer: Any, *, prefix: int, continuation: int, limit: int | None = None, name: str = "text"
) -> list[Window]:
    """Windows of `prefix + continuation` tokens, one after another without overlap; a shorter rest is left out.

    A beginning-of-text token, where the tokenizer has one, stands before each prefix and counts in it.

    Raises:
        ValueError: a size below 1, or a text that does not fill one window.
    """
    for field, value in (("prefix", prefix), ("continuation", continuation)):
        if value < 1:
            raise ValueError(f"{field} must be at least 1 token, not {value}")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    start = tokenizer("", add_special_tokens=True)["input_ids"][:1]
    start = [token for token in start if token == tokenizer.bos_token_id]
    body = prefix - len(start)
    if body < 1:
        raise ValueError(f"prefix must leave room for text beside the first token, and {prefix} does not")
    size = body + continuation
    windows = [
        Window(f"{name}/{offset}", (*start, *ids[offset : offset + body]), tuple(ids[offset + body : offset + size]))
        for offset in range(0, len(ids) - size + 1, size)
    ]
    if not windows:
        raise ValueError(f"the text has {len(ids)} tokens, and one window needs {size}")
    return windows[:limit]
