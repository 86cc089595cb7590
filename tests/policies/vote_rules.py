"""The votes of SnapKV's family as rules for `kvpress.testing.kept_sets`."""

from __future__ import annotations

import math

from kvpress.testing.kept_sets import Rule, best, snapkv_votes


def snapkv(limit_of_layer, window: int, kernel_size: int, pooling: str = "max", reduce: str = "mean") -> Rule:
    def rule(step):
        votes = snapkv_votes(step, window, kernel_size, pooling, reduce)
        if step.decoded == 0:
            step.state["limit"] = limit_of_layer(step)
        recent = range(step.seen - window, step.seen)
        return [best(votes[head], held, step.state["limit"], recent) for head, held in enumerate(step.held)]

    return rule


def adakv(budget: float, window: int, kernel_size: int, floor: float, pooling: str = "max") -> Rule:
    def rule(step):
        votes = snapkv_votes(step, window, kernel_size, pooling)
        if step.decoded == 0:
            total = budget if isinstance(budget, int) else math.floor(budget * step.prompt + 1e-9)
            mean = total - window
            pool = [
                (float(votes[head][position]), head)
                for head, held in enumerate(step.held)
                for position in held
                if position < step.seen - window
            ]
            heads = len(step.held)
            if len(pool) <= heads * mean:
                shares = [float(mean)] * heads
            else:
                chosen = sorted(pool, key=lambda item: -item[0])[: heads * mean]
                counts = [sum(head == owner for _, owner in chosen) for head in range(heads)]
                shares = [(1 - floor) * count + floor * mean for count in counts]
            whole = [math.floor(share + 1e-9) for share in shares]
            while sum(whole) < heads * mean:
                head = max(range(heads), key=lambda head: (round(shares[head] - whole[head], 9), -head))
                whole[head] += 1
                shares[head] = -math.inf
            step.state["limits"] = [window + tokens for tokens in whole]
        limits = step.state["limits"]
        recent = range(step.seen - window, step.seen)
        return [best(votes[head], held, limits[head], recent) for head, held in enumerate(step.held)]

    return rule


def skewed(model):
    """The same model with one KV head that looks at little and one that looks at much."""
    for layer in model.model.layers:
        rows = layer.self_attn.q_proj.weight.data
        group = rows.shape[0] // model.config.num_key_value_heads
        rows[:group] *= 0.1
        rows[-group:] *= 1.5
    return model
