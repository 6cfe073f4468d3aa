"""Products stream over micro-batches: the peak memory of eight is that of one, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
from pathlib import Path
import torch, transformers
import lcogeom as lg

def resident(which):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return 1024 * int(line.split()[1])

torch.manual_seed(0)
config = transformers.LlamaConfig(vocab_size=2048, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                                  intermediate_size=128, bos_token_id=None, eos_token_id=None)
model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
params = list(model.parameters())
objective = lg.objective("ppo")

def part(seed, rows):
    ids = torch.randint(2048, (rows, 256), generator=torch.Generator().manual_seed(seed))
    batch = lg.TokenBatch(ids[:, 1:].flatten(), torch.ones(255 * rows), torch.full((255 * rows,), -7.6))
    logits = lambda: model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    return logits, batch

def loss(one):
    return lambda: objective.loss(one[0](), one[1]).mean()

vector = [torch.randn_like(p) for p in params]
runs = {
    "hvp": lambda parts: lg.model_hessian([loss(one) for one in parts], params, check=False)(vector),
    "ggn": lambda parts: lg.ggn_vector_product([f for f, _ in parts], objective, [b for _, b in parts], params, vector),
}
run = runs[sys.argv[1]]
run([part(0, 1)])  # what is loaded once
found = []
for parts in ([part(0, 2)], [part(seed, 2) for seed in range(8)], [part(0, 16)]):
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run(parts)
    found.append(resident("VmHWM") - before)
print(json.dumps(found))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("product", ["hvp", "ggn"])
def test_eight_micro_batches_take_the_memory_of_one(product: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, product], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    one, eight, whole = json.loads(done.stdout)
    slack = 16 * 2**20  # of the allocator
    assert eight <= 1.3 * one + slack, [x // 2**20 for x in (one, eight, whole)]
    assert whole > 3 * one, "the same tokens at once must take more, or nothing was measured"
