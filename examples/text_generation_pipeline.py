"""The stock text-generation pipeline of transformers within a budget.

    python examples/text_generation_pipeline.py --model smollm2 --policy snapkv --budget 128

A cache serves one conversation, so a pipeline that is called several times gets a policy rather than a cache: transformers loads
`custom_generate`, which makes a fresh one for every call.
"""

from __future__ import annotations

import argparse

from transformers import pipeline

from kvpress.huggingface import CUSTOM_GENERATE
from kvpress.models import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--policy", default="snapkv")
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    for topic in ("lighthouse", "observatory"):
        text = f"The history of the {topic} begins with the first keeper, who " * 20
        answer = generate(
            text,
            max_new_tokens=arguments.max_new_tokens,
            do_sample=False,
            return_full_text=False,
            custom_generate=CUSTOM_GENERATE,
            trust_remote_code=True,
            policy=arguments.policy,
            budget=arguments.budget,
        )
        print(f"{topic}: {answer[0]['generated_text']!r}")


if __name__ == "__main__":
    main()
