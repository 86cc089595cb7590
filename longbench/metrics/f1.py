"""Token F1 of question answering, in English (SQuAD's normalisation) and Chinese (words cut by jieba)."""

import re
import string
from collections import Counter

from .chinese import cut_words

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# LongBench drops CJK punctuation too. These are its characters outside ASCII: full-width forms, CJK brackets,
# Western dashes, quotes and dots; the ideographic comma and stop among them.
_CJK_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿"
    "–—‘’‛“”„‟…‧﹏"
)
_NO_PUNCTUATION_ZH = str.maketrans("", "", string.punctuation + _CJK_PUNCTUATION)


def qa_f1(prediction: str, reference: str) -> float:
    """F1 of the bags of words after lower case, without punctuation and the articles a, an, the."""
    return bag_f1(_words(prediction), _words(reference))


def qa_f1_zh(prediction: str, reference: str) -> float:
    """F1 of the bags of Chinese words, without punctuation and spaces.

    Raises:
        MissingExtraError: jieba is not installed.
    """
    return bag_f1(_words_zh(prediction), _words_zh(reference))


def bag_f1(prediction: list[str], reference: list[str]) -> float:
    """Harmonic mean of precision and recall of the common words, counted with multiplicity; 0 if none is common."""
    common = sum((Counter(prediction) & Counter(reference)).values())
    if not common:
        return 0.0
    precision, recall = common / len(prediction), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _words_zh(text: str) -> list[str]:
    words = ("".join(word.lower().translate(_NO_PUNCTUATION_ZH).split()) for word in cut_words(text))
    return [word for word in words if word]
