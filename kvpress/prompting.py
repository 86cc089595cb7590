"""Answer one prompt with one cache."""

from dataclasses import dataclass
from typing import Any

import torch

from kvpress.cache_argument import passed
from kvpress.timing import GenerationTimer


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        text: the new text alone.
        prompt_tokens, new_tokens: lengths.
        prefill_seconds: from the start to the first new token.
        token_milliseconds: mean over the further tokens; None when there was only one.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    token_milliseconds: float | None


def encode_prompt(tokenizer: Any, prompt: str, *, chat: bool) -> torch.Tensor:
    """Token ids of the prompt, int64 `[1, tokens]`, wrapped in the chat template if `chat`.

    Raises:
        ValueError: the prompt has no tokens, or `chat` was asked of a tokenizer without a template.
    """
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ValueError("chat was asked for, but the tokenizer has no chat template")
    if chat:
        turns = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
    if not ids:
        raise ValueError("prompt must hold at least one token, got an empty text")
    return torch.tensor([ids])


def answer_prompt(model: Any, tokenizer: Any, ids: torch.Tensor, cache: Any, **generation: Any) -> Answer:
    """Generate from `ids` `[1, tokens]` into `cache`; further keywords go to `model.generate`."""
    ids = ids.to(model.device)
    timer = GenerationTimer()
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), **passed(model, cache), streamer=timer, **generation
    )
    new = output[0, ids.shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    return Answer(text, ids.shape[1], len(new), **timer.to_dict())
