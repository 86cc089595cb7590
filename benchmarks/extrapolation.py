"""Beyond the trained length: SmolLM2-135M (8,192 positions) under the full cache and under TokenSelect with re-indexed positions.

    python benchmarks/extrapolation.py --output results            # up to 20 minutes on two cores: table, JSON and a picture
    python benchmarks/extrapolation.py --quick                      # a minute: perplexity only, a coarse one
    python benchmarks/extrapolation.py --text essays.txt            # another text than the generated prose

Perplexity: one text, read in chunks; the mean loss of the tokens in each span of positions. A chunk's tokens select together by their mean
query, which includes tokens after the one that is scored; `--causal` lets every scored token select for itself instead. Pass-key: greedy
answers of prompts beyond the trained length, beside the full cache.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from kvpress import PolicyCache
from kvpress.demo.passkey import make_task
from kvpress.demo.prose import sentences
from kvpress.longbench.statistics import wilson
from kvpress.models import load_model
from kvpress.policies import Full, Policy, TokenSelect

SPAN = 2048  # positions of a row of the table
CHUNK = 512


@dataclass(frozen=True)
class Way:
    """A row of the table."""

    name: str
    policy: Policy


def ways(top_k: int, local: int, tail: int) -> list[Way]:
    """What is compared."""
    selecting = {"top_k": top_k, "sinks": 128, "local": local, "chunk": CHUNK}
    return [
        Way("full cache", Full()),
        Way(f"TokenSelect {top_k}+{local}, reindex", TokenSelect(**selecting, tail=tail)),
        Way(f"TokenSelect {top_k}+{local}, keep", TokenSelect(**selecting, tail=tail, positions="keep")),
    ]


def perplexity(model: Any, ids: torch.Tensor, policy: Policy, last: float) -> dict[int, tuple[float, int]]:
    """Loss sum and tokens of each span, `{first position: (sum, tokens)}`; stops at the time `last`."""
    cache = PolicyCache(model, policy)
    spans: dict[int, tuple[float, int]] = {}
    for first in range(0, ids.shape[1] - 1, CHUNK):
        if time.monotonic() > last:
            break
        block = ids[:, first : first + CHUNK + 1]
        targets = block[0, 1:]
        with torch.no_grad():
            logits = model(block[:, : len(targets)], cache=cache).logits[0].float()
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        span = first // SPAN * SPAN
        total, count = spans.get(span, (0.0, 0))
        spans[span] = (total + float(loss), count + len(targets))
    return spans


def passkeys(
    model: Any, tokenizer: Any, length: int, policy: Policy, chosen: range, samples: int, last: float
) -> tuple[int, int]:
    """Right answers and prompts, of the prompts `chosen` out of `samples` whose keys lie evenly over the text."""
    right = asked = 0
    for sample in chosen:
        if time.monotonic() > last:
            break
        task = make_task(tokenizer, length, seed=sample, depth=(sample + 0.5) / samples)
        prompt = task.prompt_ids.to(model.device)
        out = model.generate(
            prompt, cache=PolicyCache(model, policy), max_new_tokens=8, do_sample=False,
            prefill_chunk_size=None, pad_token_id=0,
        )  # fmt: skip
        answer = tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
        right, asked = right + task.is_right(answer), asked + 1
    return right, asked


def markdown(rows: list[dict[str, Any]]) -> str:
    """The perplexities as a table, one row a way."""
    scored = [row for row in rows if row["measure"] == "perplexity"]
    spans = sorted({row["first"] for row in scored})
    lines = [
        "| | " + " | ".join(f"{first // 1024}k-{(first + SPAN) // 1024}k" for first in spans) + " |",
        "|---" * (len(spans) + 1) + "|",
    ]
    for name in dict.fromkeys(row["way"] for row in scored):
        cells = {row["first"]: f"{row['perplexity']:.2f}" for row in scored if row["way"] == name}
        lines.append(f"| {name} | " + " | ".join(cells.get(first, "") for first in spans) + " |")
    found = [row for row in rows if row["measure"] == "passkey"]
    if found:
        lines += ["", "| pass-key found | tokens | right of | 95 % interval |", "|---|---|---|---|"]
        lines += [
            f"| {row['way']} | {row['tokens']} | {row['right']} of {row['asked']} | {row['low']:.0%}-{row['high']:.0%} |"
            for row in found
        ]
    return "\n".join(lines) + "\n"


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity against position."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for name in dict.fromkeys(row["way"] for row in rows if row["measure"] == "perplexity"):
        points = [
            (row["first"] + SPAN / 2, row["perplexity"]) for row in rows if row.get("perplexity") and row["way"] == name
        ]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.axvline(8192, color="grey", linestyle=":", label="trained length")
    axes.set(
        xlabel="position in the text",
        ylabel="perplexity",
        yscale="log",
        title="SmolLM2-135M-Instruct beyond its trained length",
    )
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as kvpress.models.load_model takes it")
    parser.add_argument("--text", type=Path, help="a text file; generated prose without it")
    parser.add_argument("--tokens", type=int, default=16_384, help="of the perplexity text")
    parser.add_argument("--top-k", type=int, default=2048)
    parser.add_argument("--local", type=int, default=512)
    parser.add_argument("--tail", type=int, default=32)
    parser.add_argument("--causal", action="store_true", help="every scored token selects for itself (slow)")
    parser.add_argument("--passkey-tokens", type=int, nargs="*", default=[9216, 12288, 16384])
    parser.add_argument("--samples", type=int, default=6, help="pass-key prompts of each length and way")
    parser.add_argument("--passkey-only", action="store_true", help="no perplexity")
    parser.add_argument("--no-full", action="store_true", help="no pass-keys with the full cache")
    parser.add_argument("--first-sample", type=int, default=0, help="with --every: share prompts out among processes")
    parser.add_argument("--every", type=int, default=1, help="of the prompts, every how many-th")
    parser.add_argument("--device", help="cpu, cuda, …; left out: the first GPU if there is one")
    parser.add_argument("--minutes", type=float, default=20, help="no new chunk or prompt begins after that")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="10,240 tokens, no pass-keys")
    parser.add_argument("--output", type=Path, help="folder for extrapolation.json, .md and .png")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tokens, arguments.passkey_tokens = 10_240, []
    torch.set_num_threads(arguments.threads)
    last = time.monotonic() + 60 * arguments.minutes
    model, tokenizer = load_model(arguments.model, device=arguments.device)
    text = (
        arguments.text.read_text("utf-8") if arguments.text else " ".join(islice(sentences(0), arguments.tokens // 4))
    )
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : arguments.tokens + 1].to(model.device)
    rows: list[dict[str, Any]] = []

    def emit(row: dict[str, Any]) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)

    compared = ways(arguments.top_k, arguments.local, CHUNK if arguments.causal else 0)
    for way in [] if arguments.passkey_only else compared:
        for first, (total, count) in perplexity(model, ids, way.policy, last).items():
            emit(
                {
                    "measure": "perplexity",
                    "way": way.name,
                    "first": first,
                    "tokens": count,
                    "perplexity": round(math.exp(total / count), 3),
                }
            )
    for tokens in arguments.passkey_tokens:
        for way in ways(arguments.top_k, arguments.local, arguments.tail)[1 if arguments.no_full else 0 : 2]:
            chosen = range(arguments.first_sample, arguments.samples, arguments.every)
            right, asked = passkeys(model, tokenizer, tokens, way.policy, chosen, arguments.samples, last)
            low, high = wilson(right / asked, asked) if asked else (0.0, 1.0)
            emit(
                {
                    "measure": "passkey",
                    "way": way.name,
                    "tokens": tokens,
                    "tail": arguments.tail,
                    "right": right,
                    "asked": asked,
                    "low": round(low, 3),
                    "high": round(high, 3),
                }
            )
    print(markdown(rows))
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        facts = {"model": arguments.model, "text": str(arguments.text or "generated prose"), "rows": rows}
        (arguments.output / "extrapolation.json").write_text(json.dumps(facts, indent=1), "utf-8")
        (arguments.output / "extrapolation.md").write_text(markdown(rows), "utf-8")
        picture(rows, arguments.output / "extrapolation.png")


if __name__ == "__main__":
    main()
