"""lm-evaluation-harness on a policy's cache: the registered model "kvpress".

Importing this module registers it. From Python: `lm_eval.simple_evaluate(model=PolicyLM(pretrained=model,
tokenizer=tokenizer, policy="snapkv", budget=0.25), tasks=[...])`.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache

from kvpress.cache_argument import passed
from kvpress.cli_arguments import parse_budget

from .arguments import parse_policy
from .errors import require
from .runner.method import Method

_purpose = "Running the tasks of lm-evaluation-harness"
HFLM: Any = require("lm_eval.models.huggingface", "lm-eval", _purpose).HFLM
register_model: Any = require("lm_eval.api.registry", "lm-eval", _purpose).register_model

# The text of a request, and the tokens of its context and of the continuation that is scored.
Request = tuple[tuple[str, str], list[int], list[int]]


@register_model("kvpress")  # type: ignore[untyped-decorator, unused-ignore]
class PolicyLM(HFLM):  # type: ignore[misc, unused-ignore]
    """`HFLM` with a fresh cache for every call.

    Generation gives the cache the whole prompt before it compresses. Log-likelihoods are computed by reading the
    context, compressing it, and reading the continuation from the compressed cache; HFLM's own way, one forward
    without a cache, would measure the model alone. Rolling perplexity has no context to compress and is refused.

    Args:
        policy: name of a policy, or `name:parameter=value`, or "full".
        budget: tokens, share or bytes; text is parsed as on the command line.
        arguments: of `HFLM`.
    """

    def __init__(self, *, policy: str = "full", budget: int | float | str | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        name, options = parse_policy(policy)
        self.method = Method(name, parse_budget(budget) if isinstance(budget, str) else budget, options)
        self.method.make_cache(self.model)  # a refused policy or budget stops before the first task

    def _model_generate(self, context: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        cache = self.method.make_cache(self.model)
        output: torch.Tensor = super()._model_generate(context, *arguments, **passed(self.model, cache), **options)
        return output

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Refused: there is no context that could be compressed before the text is scored."""
        raise NotImplementedError(
            "rolling perplexity has no context to compress: use the command eval perplexity, or a task with a context"
        )

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is what greedy decoding would have written."""
        # In the order of contexts, so that one compressed context serves all its continuations.
        order = sorted(range(len(requests)), key=lambda number: requests[number][1])
        results: dict[int, tuple[float, bool]] = {}
        before: list[int] | None = None
        for number in order:
            text, context, continuation = requests[number]
            kept = context[-max(1, self.max_length - len(continuation)) :]
            if kept != before:
                before, cache, first = kept, *self._read(kept)
            results[number] = self._score(copy.deepcopy(cache), first, continuation)
            self.cache_hook.add_partial("loglikelihood", text, results[number])
        return [results[number] for number in range(len(requests))]

    def _read(self, context: list[int]) -> tuple[Cache, torch.Tensor]:
        cache = self.method.make_cache(self.model)
        ids = torch.tensor([context], device=self.device)
        return cache, self.model(ids, **passed(self.model, cache), use_cache=True, logits_to_keep=1).logits[0]

    def _score(self, cache: Cache, first: torch.Tensor, continuation: list[int]) -> tuple[float, bool]:
        logits = first
        if len(continuation) > 1:
            ids = torch.tensor([continuation[:-1]], device=self.device)
            rest = self.model(ids, **passed(self.model, cache), use_cache=True).logits[0]
            logits = torch.cat([first, rest])
        wanted = torch.tensor(continuation, device=logits.device)
        scores = logits.double().log_softmax(-1)
        return scores.gather(-1, wanted[:, None]).sum().item(), bool((scores.argmax(-1) == wanted).all())


def main(arguments: Sequence[str]) -> None:
    """The command line of lm-evaluation-harness with the model "kvpress" known to it."""
    import sys

    command = require("lm_eval.__main__", "lm-eval", _purpose)
    before = sys.argv
    sys.argv = ["lm_eval", *arguments]
    try:
        command.cli_evaluate()
    finally:
        sys.argv = before
