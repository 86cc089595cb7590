"""ROUGE-L by the formula of the library `rouge` 1.0.1, which LongBench's published scores use.

It is not the ROUGE-L of `rouge-score`: sentences end at ".", words are case-sensitive and counted once,
and the common words are the union, over all pairs of sentences, of their longest common subsequences.
The library gives up (score 0) where its recursion runs out on sentences of about a thousand words; this does not.
"""

from .chinese import cut_words


def rouge_l(prediction: str, reference: str) -> float:
    """F of ROUGE-L; 0 when either text holds nothing but full stops."""
    predicted, referred = _sentences(prediction), _sentences(reference)
    if not predicted or not referred:
        return 0.0
    common: set[str] = set()
    for sentence in referred:
        for other in predicted:
            common |= _common_words(sentence, other)
    precision = len(common) / len({word for sentence in predicted for word in sentence})
    recall = len(common) / len({word for sentence in referred for word in sentence})
    return 2.0 * (precision * recall / (precision + recall + 1e-8))


def rouge_l_zh(prediction: str, reference: str) -> float:
    """ROUGE-L of Chinese texts, cut into words by jieba.

    Raises:
        MissingExtraError: jieba is not installed.
    """
    return rouge_l(" ".join(cut_words(prediction)), " ".join(cut_words(reference)))


def _sentences(text: str) -> list[list[str]]:
    # A piece of spaces alone is a sentence of one empty word, as in the library.
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def _common_words(left: list[str], right: list[str]) -> set[str]:
    """Words of one longest common subsequence; ties go the library's way: shorten `right` unless that loses."""
    lengths = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, word in enumerate(left, start=1):
        above, row = lengths[i - 1], lengths[i]
        for j, other in enumerate(right, start=1):
            row[j] = above[j - 1] + 1 if word == other else max(above[j], row[j - 1])
    words: set[str] = set()
    i, j = len(left), len(right)
    while i and j:
        if left[i - 1] == right[j - 1]:
            words.add(left[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words
