"""Head vote: the softmax over slots of every query head, summed over heads."""

from kvpress.kernels.head_vote.api import head_vote

__all__ = ["head_vote"]
