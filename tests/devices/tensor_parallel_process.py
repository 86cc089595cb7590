"""One of the processes that `torch.distributed.run` starts: python -m torch.distributed.run … FOLDER OUTPUT."""

import json
import os
import runpy
import sys
import warnings
from pathlib import Path

import torch
from tensor_parallel_cases import CASES, TOGETHER, outcome
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from kvpress import PolicyCache
from kvpress.errors import CacheFormatError, UnsupportedModelError
from kvpress.tensor_parallel import HeadShards

torch.set_num_threads(1)
warnings.simplefilter("ignore")
logging.disable_progress_bar()
folder, output = map(Path, sys.argv[1:])
rank = int(os.environ["RANK"])


def load():
    return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float64).eval()


def refusals(model):
    """Messages of what cannot be shared out."""
    found = []
    for policy in (
        [CASES["h2o"], CASES["tokenselect"]],
        type(CASES["tova"])(budget=((6, 8, 10, 12),) * model.config.num_hidden_layers),
    ):
        try:
            PolicyCache(model, policy)
        except UnsupportedModelError as error:
            found.append(str(error))
    return found


def saved(model):
    """Each process keeps its own heads: the other's cannot be loaded."""
    cache = PolicyCache(model, "h2o", budget=8)
    with torch.no_grad():
        model(torch.arange(3, 20)[None], past_key_values=cache)
    cache.save(output / f"cache-{rank}")
    torch.distributed.barrier()
    loaded = PolicyCache.load(output / f"cache-{rank}", model)
    equal = all(torch.equal(loaded.kept_positions(layer), cache.kept_positions(layer)) for layer in range(2))
    try:
        PolicyCache.load(output / f"cache-{1 - rank}", model)
    except CacheFormatError as error:
        return [equal, str(error)]
    return [equal, ""]


model = load()
found = {name: outcome(model, policy) for name, policy in CASES.items()}
found["refusals"] = refusals(model)
found["saved"] = saved(model)
HeadShards.sum = lambda self, tensor: tensor * self.size  # sabotage: each process decides for itself
HeadShards.gather = lambda self, scores, fill: torch.cat([scores] * self.size, dim=1)
HeadShards.first = lambda self, heads: 0
found["alone"] = {name: outcome(model, CASES[name]) for name in (*TOGETHER, "random", "keyformer")}
(output / f"{rank}.json").write_text(json.dumps(found))
sys.argv = ["tensor_parallel.py", str(folder.with_name("tiny")), "a prompt of some length " * 6, "--budget", "40"]
runpy.run_path(str(Path(__file__).parents[2] / "examples" / "tensor_parallel.py"), run_name="__main__")
