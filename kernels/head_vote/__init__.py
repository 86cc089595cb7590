"""Head vote: the softmax over slots of every query head, summed over heads; and the slots with most votes."""

from kvpress.kernels.head_vote.api import head_vote, top_slots

__all__ = ["head_vote", "top_slots"]
