"""What the process really takes: a context of four times the limit costs no more resident memory than the limit, beside the model's own."""

import json
import os
import subprocess
import sys

LIMIT = 24 << 20
# Freed tensors go back to the system at once: what is measured is what is held, not what the C library keeps (that varies by 40 MB).
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
CHILD = """
import json, sys, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from kvpress import PolicyCache
from kvpress.offload import Offload
from kvpress.policies import Full, StreamingLLM

folder, kind, chunk, limit = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=16, num_attention_heads=8, num_key_value_heads=8, head_dim=64,
)).eval()
tokens = 4 * limit // (16 * 8 * 64 * 2 * 4)
ids = torch.randint(0, 64, (1, tokens))
own = kind == "own"
cache = PolicyCache(model, StreamingLLM(budget=64) if own else Full(), offload=None if own else Offload(host=limit, disk=folder, block=64))
with torch.no_grad():
    for piece in (*ids[:, :-4].split(chunk, dim=1), *ids[:, -4:].split(1, dim=1)):
        model(piece, past_key_values=cache, logits_to_keep=1)
line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(json.dumps([int(line.split()[1]) * 1024, cache.full_nbytes, len(cache.report().tiers)]))
cache.close()
"""


def peak(folder, kind, chunk):
    command = [sys.executable, "-c", CHILD, str(folder), kind, str(chunk), str(LIMIT)]
    return json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=200, env=os.environ | ALLOCATOR).stdout
    )


def test_peak_resident_memory_keeps_to_the_limit(folder):
    for chunk in (1 << 20, 256):
        own, _, _ = peak(folder, "own", chunk)
        with_offload, kv_bytes, tiers = peak(folder, "offload", chunk)
        assert kv_bytes >= 3.9 * LIMIT and tiers == 2
        assert with_offload - own <= 1.1 * LIMIT
