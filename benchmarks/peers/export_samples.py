"""Writes RULER samples as JSON lines of token ids, so that another library can be asked the very same questions.

python benchmarks/peers/export_samples.py --tasks niah_single_2 --lengths 1024 --samples 10 --answer-tokens 12 --output samples.jsonl
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

from kvpress.longbench.prompt import PromptEncoder
from kvpress.longbench.ruler import ruler_samples
from kvpress.models import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tasks", nargs="+", default=["niah_single_2"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024])
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--answer-tokens", type=int, help="cap of the answers, as of `kvpress eval ruler`")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    _, tokenizer = load_model(arguments.model)
    encoder = PromptEncoder(tokenizer)
    with arguments.output.open("w", encoding="utf-8") as file:
        for length in arguments.lengths:
            for task in arguments.tasks:
                for sample in ruler_samples(task, length, arguments.samples, encoder, seed=arguments.seed):
                    limit = min(sample.max_new_tokens, arguments.answer_tokens or sample.max_new_tokens)
                    prompt = encoder.encode(sample)
                    row = {
                        "sample": asdict(replace(sample, max_new_tokens=limit, context="", question="")),
                        "context_ids": prompt.context_ids,
                        "question_ids": prompt.question_ids,
                    }
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
