"""Evaluation: RULER, LongBench, needle and perplexity."""
