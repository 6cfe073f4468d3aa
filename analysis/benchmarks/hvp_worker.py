"""One model of hvp.py in a process of its own.

    python hvp_worker.py MODEL PEER

MODEL: gpt2, llama, smollm2. PEER: the site-packages folder that holds hessian-eigenthings, searched behind this
environment's own; "." leaves it out.
One JSON request a line on stdin, {"method": ..., "memory": bool}; one JSON answer a line on stdout.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from torch import Tensor

import lcogeom as lg
from lcogeom.models import load_model

SHAPES = {"gpt2": (4, 128), "llama": (4, 128), "smollm2": (4, 64)}  # sequences, tokens of each
OBJECTIVE = lg.objective("ppo", clip_low=None, clip_high=None)


def build(name: str) -> transformers.PreTrainedModel:
    """5 million parameters with random weights, or SmolLM2-135M; eager attention, for every method."""
    torch.manual_seed(0)
    if name == "smollm2":
        model = load_model("smollm2").model
        model.set_attn_implementation("eager")
        return model.eval()
    size = {"vocab_size": 1024, "bos_token_id": None, "eos_token_id": None}
    config = {
        "gpt2": transformers.GPT2Config(n_embd=256, n_layer=6, n_head=8, n_positions=128, **size),
        "llama": transformers.LlamaConfig(
            hidden_size=256, num_hidden_layers=6, num_attention_heads=8, intermediate_size=688, **size
        ),
    }[name]
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def methods(
    model: transformers.PreTrainedModel, shape: tuple[int, int]
) -> tuple[dict[str, Callable[[], object]], Callable[[], None]]:
    """(name -> one product with the same vector, 'gradient' is the unit; what lets go of the kept graph)."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, shape, generator=rng)
    params = [p for p in model.parameters() if p.requires_grad]
    vector = [torch.randn(p.shape, generator=rng) for p in params]

    def logits() -> Tensor:
        return model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)

    with torch.no_grad():
        actions = ids[:, 1:].flatten()
        old = torch.log_softmax(logits(), 1).gather(1, actions[:, None]).squeeze(1) - 0.1
    batch = lg.TokenBatch(actions, advantages=torch.ones(len(actions)), old_logprobs=old.clamp(max=0.0))

    def loss() -> Tensor:
        return OBJECTIVE.loss(logits(), batch).mean()

    def theirs() -> Callable[[], object]:
        sys.path.append(sys.argv[2])
        from hessian_eigenthings import HessianOperator

        operator = HessianOperator(model, [0], lambda *_: loss())
        flat = torch.cat([v.reshape(-1) for v in vector])
        return lambda: operator.matvec(flat)

    exact, kept, near = (
        lg.model_hessian(loss, params, route=route, check=False, keep_graph=keep)
        for route, keep in (("double-backward", False), ("double-backward", True), ("finite-differences", False))
    )

    def from_the_graph() -> Callable[[], object]:
        kept.release()
        kept(vector)
        return lambda: kept(vector)

    ours = {
        "gradient": lambda: torch.autograd.grad(loss(), params),
        "hvp": lambda: exact(vector),
        "hvp, graph kept": from_the_graph,
        "hvp, differences": lambda: near(vector),
        "ggn": lambda: lg.ggn_vector_product(logits, OBJECTIVE, batch, params, vector),
    }
    return ours if sys.argv[2] == "." else ours | {"hessian-eigenthings": theirs()}, kept.release


def resident(which: str) -> int:
    """Bytes of the resident set: VmRSS now, VmHWM at its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return 1024 * int(line.split()[1])


def measure(name: str, run: Callable[[], object], memory: bool) -> dict[str, float]:
    """One product; of the kept graph its own time, without the making, but its whole memory."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    if name == "hvp, graph kept":
        run = run()
    start = time.perf_counter()
    found = run()
    seconds = time.perf_counter() - start
    del found
    return {"seconds": seconds} | ({"bytes": resident("VmHWM") - before} if memory else {})


if __name__ == "__main__":
    model = build(sys.argv[1])
    known, release = methods(model, SHAPES[sys.argv[1]])
    about = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "shape": SHAPES[sys.argv[1]],
        "versions": {name: version(name) for name in ("lcogeom", "torch", "transformers")},
    }
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        name = request["method"]
        print(json.dumps(measure(name, known[name], request.get("memory", False))), flush=True)
        release()
