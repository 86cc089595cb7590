"""One run of the demo: generate with a cache, and note the answer, what was kept, the memory and the time."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import DynamicCache

from kvpress.cache import layer_nbytes
from kvpress.cache_argument import passed
from kvpress.demo.passkey import PasskeyTask
from kvpress.layer import PolicyLayer
from kvpress.timing import GenerationTimer

NEW_TOKENS = 10
QUERY_AWARE, QUERY_AGNOSTIC = "query-aware", "query-agnostic"


@dataclass(frozen=True)
class Measurement:
    """What one run gave.

    Attributes:
        policy: name of the policy, or "DynamicCache" for transformers' own cache.
        mode: "query-aware" (prompt in one piece) or "query-agnostic" (context compressed before the question is known).
        answer: the generated text.
        right: whether the first number in it is the key.
        kept_tokens: mean number of tokens held per KV head of the compressed layers, at the end.
        seen_tokens: tokens that went through the model.
        held_bytes: bytes of the cache's storages, at the end.
        full_bytes: bytes a full cache would hold.
        prefill_seconds: from the start to the first new token.
        token_milliseconds: mean over the further tokens; None when there was only one.
    """

    policy: str
    mode: str
    answer: str
    right: bool
    kept_tokens: float
    seen_tokens: int
    held_bytes: int
    full_bytes: int
    prefill_seconds: float
    token_milliseconds: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(model: Any, tokenizer: Any, task: PasskeyTask, policy: str, mode: str, cache: Any) -> Measurement:
    """Answer the task with an empty cache.

    Args:
        model, tokenizer: as `load_model` gives them.
        task: the prompt; its ids are moved to the model's device.
        policy: the name to report.
        mode: `QUERY_AWARE` or `QUERY_AGNOSTIC`.
        cache: the empty cache; making it is not part of the time.
    """
    context_ids, prompt_ids = task.context_ids.to(model.device), task.prompt_ids.to(model.device)
    timer = GenerationTimer()
    if mode == QUERY_AGNOSTIC:
        with torch.no_grad():
            model(context_ids, **passed(model, cache), use_cache=True, logits_to_keep=1)
    output = model.generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        **passed(model, cache),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        streamer=timer,
    )
    answer = tokenizer.decode(output[0, prompt_ids.shape[1] :], skip_special_tokens=True)
    kept, held, full = kept_and_bytes(cache)
    return Measurement(
        policy=policy,
        mode=mode,
        answer=answer,
        right=task.is_right(answer),
        kept_tokens=kept,
        seen_tokens=int(cache.get_seq_length()),
        held_bytes=held,
        full_bytes=full,
        **timer.to_dict(),
    )


def kept_and_bytes(cache: Any) -> tuple[float, int, int]:
    """(mean tokens kept per KV head of the compressed layers, bytes held, bytes of a full cache), of any cache."""
    if isinstance(cache, DynamicCache):
        held = sum(layer_nbytes(layer) for layer in cache.layers)
        return float(cache.get_seq_length()), held, held
    compressed = [index for index, layer in enumerate(cache.layers) if isinstance(layer, PolicyLayer)]
    counts = [(cache.kept_positions(index) >= 0).sum(-1).float().mean() for index in compressed]
    return float(torch.stack(counts).mean()), int(cache.nbytes), int(cache.full_nbytes)
