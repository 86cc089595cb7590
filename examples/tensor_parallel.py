"""One model, its heads shared out among processes, and a compressed cache in each:

python -m torch.distributed.run --nproc-per-node 2 examples/tensor_parallel.py MODEL "a long text" --policy adakv --budget 256
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvpress import PolicyCache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model whose KV heads the number of processes divides")
    parser.add_argument("prompt")
    parser.add_argument("--policy", default="adakv")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, tp_plan="auto").eval()
    inputs = tokenizer(arguments.prompt, return_tensors="pt").to(model.device)
    cache = PolicyCache(model, arguments.policy, budget=arguments.budget)
    out = model.generate(**inputs, cache=cache, max_new_tokens=arguments.max_new_tokens, do_sample=False)
    here = cache.kept_positions(0).shape[1]
    print(f"process {cache.heads.rank}: {here} KV heads, {cache.nbytes:,} of {cache.full_nbytes:,} bytes")
    if cache.heads.rank == 0:
        print(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
