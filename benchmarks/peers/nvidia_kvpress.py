"""Answers exported samples under the presses of NVIDIA kvpress. Runs inside the environment of `make_environment.sh`.

    .venv-peer/bin/python benchmarks/peers/nvidia_kvpress.py --model FOLDER --samples samples.jsonl --output answers.jsonl

FOLDER holds the checkpoint in transformers' format (`kvpress` keeps a converted SmolLM2 in its cache folder). A run that was
stopped goes on where it was.

Every press compresses once, after the prompt, and the prompt's attention is the same for all of them. So the prompt is read once,
with a hook that hands each press's own `compress` the layer's keys and values; `--check` compares this with the library's own way
(`with press(model)`), tensor by tensor. Presses run with their own defaults. Positions go on from the full prompt, as in the
library's pipeline. `observed_attention` needs attention weights: a second forward with eager attention.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import kvpress  # NVIDIA's

PRESSES: dict[str, Callable[[float], Any]] = {
    "streaming_llm": lambda ratio: kvpress.StreamingLLMPress(ratio),
    "snapkv": lambda ratio: kvpress.SnapKVPress(ratio),
    "pyramidkv": lambda ratio: kvpress.PyramidKVPress(ratio),
    "adakv": lambda ratio: kvpress.AdaKVPress(kvpress.SnapKVPress(ratio)),
    "tova": lambda ratio: kvpress.TOVAPress(ratio),
    "observed_attention": lambda ratio: kvpress.ObservedAttentionPress(ratio),
    "knorm": lambda ratio: kvpress.KnormPress(ratio),
    "random": lambda ratio: kvpress.RandomPress(ratio, seed=0),
}
EAGER = ("observed_attention",)


class Compressed:
    """What a press left of a prompt: keys and values of each layer, and the indices that it masks."""

    def __init__(self, press: Any) -> None:
        self.press = press
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.masked: list[Any] = []

    def cache(self, model: Any) -> DynamicCache:
        """A cache of these tensors, and their masks on the model's layers, where the library keeps them."""
        cache = DynamicCache()
        for index, (keys, values) in enumerate(self.layers):
            cache.update(keys.clone(), values.clone(), index)
            model.model.layers[index].self_attn.masked_key_indices = self.masked[index]
        return cache

    @property
    def lengths(self) -> set[int]:
        return {keys.shape[2] for keys, _ in self.layers}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for pair in self.layers for tensor in pair)


@contextmanager
def compress_for(model: Any, compressed: dict[Any, Compressed]) -> Iterator[None]:
    """While a prompt is read, give every layer's keys and values to every press."""

    def hook(module: Any, given: Any, kwargs: dict[str, Any], output: Any) -> None:
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        for item in compressed.values():
            module.masked_key_indices = None
            keys, values = item.press.compress(
                module, kwargs["hidden_states"], layer.keys, layer.values, output[1], kwargs
            )
            item.layers.append((keys, values))
            item.masked.append(module.masked_key_indices)
            module.masked_key_indices = None

    handles = []
    for layer in model.model.layers:
        layer.self_attn.rotary_emb = model.model.rotary_emb
        handles.append(layer.self_attn.register_forward_hook(hook, with_kwargs=True))
    try:
        for item in compressed.values():
            item.press.post_init_from_model(model)
        yield
    finally:
        for handle in handles:
            handle.remove()


def read(model: Any, ids: list[int], cache: DynamicCache, position: int) -> torch.Tensor:
    """Logits of the token after `ids`, which stand at `position` and on."""
    positions = torch.arange(position, position + len(ids))[None]
    output = model(torch.tensor([ids]), past_key_values=cache, position_ids=positions, logits_to_keep=1)
    return output.logits[0, -1]


def continue_greedily(
    model: Any, cache: DynamicCache, first: int, position: int, limit: int, ends: set[int]
) -> list[int]:
    new = [first]
    while len(new) < limit and new[-1] not in ends:
        new.append(int(read(model, new[-1:], cache, position + len(new) - 1).argmax()))
    return new


def answer_sample(
    models: dict[str, Any], tokenizer: Any, row: dict[str, Any], wanted: list[tuple[str, float]], query_aware: bool
) -> Iterator[dict[str, Any]]:
    """One result for each press and ratio."""
    prompt = row["context_ids"] + (row["question_ids"] if query_aware else [])
    question = [] if query_aware else row["question_ids"]
    model = models["sdpa"]
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    for kind, reader in models.items():
        mine = {key: Compressed(PRESSES[key[0]](key[1])) for key in wanted if (key[0] in EAGER) == (kind == "eager")}
        if not mine:
            continue
        full = DynamicCache()
        start = time.perf_counter()
        with compress_for(reader, mine):
            logits = read(reader, prompt, full, 0)
        seconds = time.perf_counter() - start
        whole = sum(layer.keys.nbytes + layer.values.nbytes for layer in full.layers)
        for (name, ratio), compressed in mine.items():
            cache = compressed.cache(model)
            error, new = None, []
            start = time.perf_counter()
            try:
                first = logits
                # Layers of unequal length: several tokens at once raise an error in the library's pipeline.
                parts = [question] if len(compressed.lengths) == 1 else [[token] for token in question]
                position = len(prompt)
                for part in parts if question else []:
                    first = read(model, part, cache, position)
                    position += len(part)
                new = continue_greedily(
                    model, cache, int(first.argmax()), position, row["sample"]["max_new_tokens"], ends
                )
            except (ValueError, RuntimeError) as raised:
                error = f"{type(raised).__name__}: {raised}"
            yield {
                "id": row["sample"]["sample_id"],
                "press": name,
                "ratio": ratio,
                "prediction": tokenizer.decode(new, skip_special_tokens=True),
                "prompt_tokens": len(row["context_ids"]) + len(row["question_ids"]),
                "new_tokens": len(new),
                "prefill_seconds": seconds,
                "decode_seconds": time.perf_counter() - start,
                "cache_bytes": compressed.nbytes,
                "full_bytes": whole,
                "error": error,
            }
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None


def check(models: dict[str, Any], row: dict[str, Any], wanted: list[tuple[str, float]]) -> None:
    """Compare the shared forward with the library's own, for every press; a random one draws anew in each layer."""
    for key in wanted:
        model = models["eager" if key[0] in EAGER else "sdpa"]
        ours = {key: Compressed(PRESSES[key[0]](key[1]))}
        with compress_for(model, ours):
            read(model, row["context_ids"], DynamicCache(), 0)
        theirs = DynamicCache()
        with PRESSES[key[0]](key[1])(model):
            read(model, row["context_ids"], theirs, 0)
        for index, (layer, (keys, values)) in enumerate(zip(theirs.layers, ours[key].layers, strict=True)):
            if not torch.equal(layer.keys, keys) or not torch.equal(layer.values, values):
                raise SystemExit(f"{key}: layer {index} differs from the library's own prefill")
            mask = model.model.layers[index].self_attn.masked_key_indices
            for mine, other in zip(ours[key].masked[index] or (), mask or (), strict=True):
                if not torch.equal(mine, other):
                    raise SystemExit(f"{key}: masked keys of layer {index} differ from the library's own")
        print(
            f"{key[0]} at ratio {key[1]}: equal in {len(theirs.layers)} layers, {sorted(ours[key].lengths)} tokens kept"
        )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--query-aware", action="store_true")
    parser.add_argument("--presses", nargs="+", default=list(PRESSES), choices=list(PRESSES))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25, 0.125], help="shares that stay")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="only compare the shared forward with the library's own")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    models = {
        kind: AutoModelForCausalLM.from_pretrained(
            arguments.model, attn_implementation=kind, dtype=torch.float32
        ).eval()
        for kind in ("sdpa", "eager")
        if kind == "sdpa" or any(name in EAGER for name in arguments.presses)
    }
    wanted = [(name, 1 - budget) for name in arguments.presses for budget in arguments.budgets]
    rows = [json.loads(line) for line in arguments.samples.read_text(encoding="utf-8").splitlines()]
    if arguments.check:
        check(models, rows[0], wanted)
        return
    done = set()
    if arguments.output.exists():
        for line in arguments.output.read_text(encoding="utf-8").splitlines():
            answer = json.loads(line)
            done.add((answer["id"], answer["press"], answer["ratio"]))
    with arguments.output.open("a", encoding="utf-8") as file:
        for row in rows:
            missing = [key for key in wanted if (row["sample"]["sample_id"], *key) not in done]
            if missing:
                for answer in answer_sample(models, tokenizer, row, missing, arguments.query_aware):
                    file.write(json.dumps(answer) + "\n")
                    file.flush()


if __name__ == "__main__":
    main()
