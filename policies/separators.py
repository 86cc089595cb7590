"""Which tokens of a vocabulary separate: punctuation and white space."""

from __future__ import annotations

from typing import Protocol

PUNCTUATION = frozenset(".,?!;:")


class Tokenizer(Protocol):
    """What is asked of a tokenizer."""

    def get_vocab(self) -> dict[str, int]:
        """Token to id."""

    def decode(self, token_ids: list[int]) -> str:
        """The text of ids."""


def separator_ids(tokenizer: Tokenizer, *, whitespace: bool = True) -> tuple[int, ...]:
    """Ids of the tokens that are one of `. , ? ! ; :`, bare or among white space, or white space alone.

    The rule of SepLLM (arXiv 2412.12094) for any vocabulary: merged forms such as `" ,"` or `".\\n"` count, `"..."`
    does not. The vocabulary is scanned once a call, by decoding every token.

    Args:
        tokenizer: of the model.
        whitespace: count tokens of white space too (spaces, tabs, line ends).

    Returns:
        Ascending ids.
    """
    special = set(getattr(tokenizer, "all_special_ids", ()))
    found = []
    for token in sorted(set(tokenizer.get_vocab().values()) - special):
        text = tokenizer.decode([token])
        if text.strip() in PUNCTUATION or (whitespace and text and not text.strip()):
            found.append(token)
    return tuple(found)
