"""From a sample to token ids: context and question are tokenised apart, so the context is an exact prefix."""

from dataclasses import dataclass, replace
from typing import Any

from .sample import Sample

_MARK = "\ue000content\ue001"


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids of a prompt: `context_ids` may be compressed before `question_ids` (never empty) is known."""

    context_ids: tuple[int, ...]
    question_ids: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        return self.context_ids + self.question_ids

    def __len__(self) -> int:
        return len(self.context_ids) + len(self.question_ids)


class PromptEncoder:
    """Encodes samples with one tokenizer, with or without its chat template.

    The answer prefix stands after the assistant header, as a started answer.

    Raises:
        ValueError: `chat` is asked for and the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, *, chat: bool = False) -> None:
        self.tokenizer = tokenizer
        self.chat = chat
        self._header, self._footer = self._split_chat_template() if chat else ("", "")

    def encode(self, sample: Sample) -> EncodedPrompt:
        chat = self.chat and sample.chat
        header, footer = (self._header, self._footer) if chat else ("", "")
        context = self._tokens(header + sample.context, special=not chat)
        question = self._tokens(sample.question + footer + sample.answer_prefix, special=False)
        if not question:
            # Generation needs one token to start from; the last token of the context is the question then.
            context, question = context[:-1], context[-1:]
        return EncodedPrompt(tuple(context), tuple(question))

    def length(self, sample: Sample) -> int:
        """Tokens of the whole prompt, chat template and answer prefix included."""
        return len(self.encode(sample))

    def truncate_middle(self, sample: Sample, max_length: int) -> Sample:
        """Keep the first and the last `max_length // 2` tokens of the bare prompt (LongBench, `pred.py`).

        The text is cut before the chat template is added. The question stays the question when it lies whole in
        the kept end; otherwise the kept end is the question.
        """
        ids = self._tokens(sample.text, special=True)
        if len(ids) <= max_length:
            return sample
        half = max_length // 2
        head = self.tokenizer.decode(ids[:half], skip_special_tokens=True)
        tail = self.tokenizer.decode(ids[-half:], skip_special_tokens=True)
        ending = sample.question + sample.answer_prefix
        details = {**sample.details, "truncated_from": len(ids)}
        if tail.endswith(ending):
            context = head + tail[: len(tail) - len(ending)]
            return replace(sample, context=context, details=details)
        return replace(sample, context=head, question=tail, answer_prefix="", details=details)

    def _tokens(self, text: str, *, special: bool) -> list[int]:
        # verbose=False: prompts longer than the window are reported by the run itself.
        ids: list[int] = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        if special and ids and ids[-1] == end and ids[0] != end and not text.endswith(self.tokenizer.eos_token):
            ids = ids[:-1]  # a tokenizer that closes every text would end the prompt before the question
        return ids

    def _split_chat_template(self) -> tuple[str, str]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError("chat=True needs a tokenizer with a chat template, and this one has none")
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
        )
        header, mark, footer = text.partition(_MARK)
        if not mark:
            raise ValueError("chat=True: the chat template does not contain the user's message unchanged")
        return header, footer
