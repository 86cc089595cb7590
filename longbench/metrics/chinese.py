"""Chinese word segmentation, which only five tasks of LongBench need."""

import logging

from ..errors import require


def cut_words(text: str) -> list[str]:
    """Words of a Chinese text, cut by jieba in its default mode, as LongBench does.

    Raises:
        MissingExtraError: jieba is not installed.
    """
    jieba = require("jieba", "zh", "Scoring Chinese answers")
    jieba.setLogLevel(logging.WARNING)  # it reports the building of its dictionary on stderr otherwise
    return list(jieba.cut(text, cut_all=False))
