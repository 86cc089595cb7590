"""How a compressed context changes the prediction of the text that follows it."""

from .divergence import TokenScores, score_tokens
from .run import perplexity_totals, run_perplexity
from .windows import Window, text_windows

__all__ = ["TokenScores", "Window", "perplexity_totals", "run_perplexity", "score_tokens", "text_windows"]
