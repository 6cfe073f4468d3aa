"""What do both extreme eigenvalues of a token's logit Hessian cost, here and by products with the matrix?

    python analysis/benchmarks/logit_hessian.py              (8 minutes on 2 cores; the first time 5 more to install)
    python analysis/benchmarks/logit_hessian.py --quick      (a few seconds: V = 1,000, without the other packages)

Ours, in a batch and token by token, against plain autograd with ARPACK, hessian-eigenthings and curvlinops, each in a
process and an environment of its own, all given the same float32 logits, all in float64. The methods take turns, so
that a disturbed machine shows in the range. The truth that errors are taken against: logit_hessian_truth.py.
Writes logit_hessian.json beside this file and the tables into analysis/README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from isolated import CACHE, THREADS, Worker
from logit_hessian_truth import certified, extremes, log_probability
from report import HERE, cpu_model, update_readme
from safetensors.torch import save_file
from torch import Tensor

CASES = ("ppo, A > 0", "ppo, A < 0", "sft")
BATCH = {1_000: 1024, 10_000: 512, 49_152: 128, 151_936: 64}  # tokens of ours, by V
ALONE = {1_000: 16, 10_000: 12, 49_152: 8, 151_936: 6}  # tokens of the others, and of ours one by one
ALONE_SFT = 2  # the end at 0 keeps ARPACK busy until it gives up
ROUNDS = 5
PEERS = ("autograd", "hessian-eigenthings", "curvlinops")
WORKER = HERE / "logit_hessian_worker.py"
TEXT = (
    "The capital of France is Paris. In the year 1789 the French Revolution began; it changed the course of European "
    "history. To compute 12 * 7 we multiply: 84. Once upon a time there was a small fox who lived in a forest near the "
    "sea, and every morning she walked down to the water to look for shells. The function returns a list of numbers."
)


# tokens -----------------------------------------------------------------------------------------


def power_law(count: int, vocab: int) -> Tensor:
    """(count, V) float32: z = -s log(rank) + noise, from flat (s = 0.9) to peaked (2.2); SmolLM2's s is about 1.5."""
    rng = torch.Generator().manual_seed(vocab)
    slopes = torch.empty(count, 1).uniform_(0.9, 2.2, generator=rng)
    ranks = torch.stack([torch.randperm(vocab, generator=rng) for _ in range(count)]) + 1.0
    return -slopes * ranks.log() + 0.5 * torch.randn(count, vocab, generator=rng)


def smollm2() -> Tensor | None:
    """SmolLM2's logits at every position of TEXT, in a drawn order; None where `lcogeom replay smollm2` never ran."""
    folder = CACHE / "smollm2-135m-instruct"
    if not folder.is_dir():
        return None
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = transformers.AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits[0]
    return logits[torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))].contiguous()


def save_tokens(logits: Tensor, file: Path) -> dict[str, Tensor]:
    """Actions drawn from softmax(z) among those with pi < 1/2: there both of PPO's ends differ from 0."""
    probs = torch.softmax(logits.double(), dim=1)
    rng = torch.Generator().manual_seed(1)
    actions = torch.multinomial(probs.where(probs < 0.5, 0.0), 1, generator=rng)
    logp = probs.gather(1, actions).log().squeeze(1)
    old = logp + 0.1 * torch.randn(len(logp), generator=rng, dtype=torch.float64)
    some = {"logits": logits, "actions": actions.squeeze(1), "old_logprobs": old}
    save_file(some, file)
    return some


# measurements -----------------------------------------------------------------------------------


def truth(some: dict[str, Tensor], case: str, count: int, confirm: bool) -> list[tuple[float, float]]:
    """Both ends of the first tokens; on demand the first one, of a small V all, confirmed at 60 digits."""
    ends = []
    for token in range(count):
        logits, action = some["logits"][token].numpy(), int(some["actions"][token])
        ratio = np.exp(log_probability(logits, action) - float(some["old_logprobs"][token]))
        f1, f2 = {"ppo, A > 0": (-ratio, -ratio), "ppo, A < 0": (ratio, ratio), "sft": (-1.0, 0.0)}[case]
        ends.append(extremes(logits, action, f1, f2))
        if confirm and (token == 0 or len(logits) <= 1_000) and not certified(logits, action, f1, f2, ends=ends[-1]):
            raise RuntimeError(f"{case}: the truth is wrong at {ends[-1]}")
    return ends


def errors(found: dict, wanted: list[tuple[float, float]]) -> dict[str, object]:
    """Largest relative error of either end and how often it is missing; of an end that is 0, relative to the other."""
    result: dict[str, object] = {}
    for side, end in enumerate(("lowest", "highest")):
        pairs = list(zip(found[end], wanted, strict=False))
        off = [abs(x - w[side]) / (abs(w[side]) or abs(w[1 - side])) for x, w in pairs if x is not None]
        result[end] = {"error": max(off, default=None), "missing": sum(x is None for x, _ in pairs), "of": len(pairs)}
    return result


def measure(workers: dict[str, Worker], name: str, some: dict[str, Tensor], case: str, rounds: int) -> dict:
    """One set and objective: seconds per token of every method in every round, errors of the first tokens."""
    total, vocab = some["logits"].shape
    alone = min(ALONE_SFT if case == "sft" else ALONE[vocab], total)
    base = {"set": name, "case": case, "device": "cpu"}
    jobs = {
        "ours, batched": (workers["ours"], {**base, "tokens": total, "batched": True}),
        "ours, one by one": (workers["ours"], {**base, "tokens": alone}),
        **{peer: (workers[peer], {**base, "tokens": alone}) for peer in PEERS if peer in workers},
    }
    if workers["ours"].about["gpu"]:
        jobs["ours, batched, GPU"] = (workers["ours"], {**base, "tokens": total, "batched": True, "device": "cuda"})
    for worker, request in jobs.values():
        worker(**{**request, "tokens": 1})  # what happens only once
    seconds: dict[str, list[float]] = {method: [] for method in jobs}
    last = {}
    for _ in range(rounds):
        for method, (worker, request) in jobs.items():
            last[method] = worker(**request)
            seconds[method].append(last[method]["seconds"] / request["tokens"])
    wanted = truth(some, case, alone, confirm=case == "ppo, A > 0")
    methods = {
        method: {
            "tokens": jobs[method][1]["tokens"],
            "seconds_per_token": seconds[method],
            **errors(last[method], wanted),
        }
        for method in jobs
    }
    return {"set": name, "vocab": vocab, "objective": case, "methods": methods}


# tables -----------------------------------------------------------------------------------------


def milliseconds(row: dict, method: str) -> float:
    return 1e3 * float(np.median(row["methods"][method]["seconds_per_token"]))


def times(results: dict) -> list[str]:
    """Milliseconds per token of ours; of the others how many times that, with the range over the rounds."""
    others = [method for method in results["rows"][-1]["methods"] if method != "ours, batched"]
    lines = ["| objective | tokens | ours, batched, ms | of the floor | " + " | ".join(others) + " |"]
    lines += ["| --- " * 2 + "| ---: " * (2 + len(others)) + "|"]
    for row in results["rows"]:
        batched = np.array(row["methods"]["ours, batched"]["seconds_per_token"])
        floor = 4e3 * row["vocab"] / results["bandwidth"]["read"]
        cells = [row["objective"], row["set"], f"{milliseconds(row, 'ours, batched'):.3g}"]
        cells.append(f"{milliseconds(row, 'ours, batched') / floor:.0f} x")
        for method in others:
            ratio = np.array(row["methods"][method]["seconds_per_token"]) / batched
            cells.append(f"{np.median(ratio):.3g} x [{ratio.min():.3g}, {ratio.max():.3g}]")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def accuracy(results: dict) -> list[str]:
    """Largest relative error of the lowest / highest eigenvalue."""
    methods = list(results["rows"][-1]["methods"])
    lines = ["| objective | tokens | " + " | ".join(methods) + " |", "| --- " * 2 + "| ---: " * len(methods) + "|"]
    for row in results["rows"]:
        cells = [row["objective"], row["set"]]
        for method in methods:
            ends = [row["methods"][method][end] for end in ("lowest", "highest")]
            cells.append(
                " / ".join(
                    f"none in {e['missing']} of {e['of']}" if e["missing"] else f"{e['error']:.1g}" for e in ends
                )
            )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def report(results: dict) -> str:
    about = results["environment"]
    lines = [
        f"{about['date']}, {about['cpu']}, {about['threads']} threads of {about['cores']} cores, torch "
        f"{about['versions']['torch']}. GPU: {about['gpu'] or 'not measured'}. Milliseconds per token of ours in one "
        f"batch, median of {results['rounds']} rounds, also as a multiple of the time to read its logits once "
        f"({results['bandwidth']['read'] / 1e9:.1f} GB/s); the others as multiples of ours, median [range].",
        "SFT's lowest eigenvalue is 0: the others look for it in vain, ARPACK until it gives up.",
        "", *times(results), "",
        "Largest relative error of the lowest / highest eigenvalue (of one that is 0: relative to the other):",
        "", *accuracy(results), "",
    ]  # fmt: skip
    for case, slope in results["growth"].items():
        lines.append(f"- {case}: time grows as V^{slope:.2f}.")
    extra = results["memory"]
    lines.append(
        f"- {extra['tokens']} tokens at V = {extra['vocab']:,}: Hessian, negative count and both eigenvalues take "
        f"{extra['extra'] / 2**20:.0f} MiB beyond the logits' {extra['logits'] / 2**20:.0f} MiB."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="V = 1,000, few tokens, ours and plain autograd only")
    parser.add_argument("--out", type=Path, help="the JSON; --quick writes none without it")
    arguments = parser.parse_args()
    out = arguments.out or (None if arguments.quick else HERE / "logit_hessian.json")
    began = time.perf_counter()
    torch.set_num_threads(THREADS)

    with tempfile.TemporaryDirectory() as folder:
        sets = {f"V = {vocab:,}": power_law(count, vocab) for vocab, count in BATCH.items()}
        if arguments.quick:
            sets = {"V = 1,000": power_law(32, 1_000)}
        elif (real := smollm2()) is not None:
            sets["SmolLM2, V = 49,152"] = real
        tokens = {name: save_tokens(logits, Path(folder) / f"{name}.safetensors") for name, logits in sets.items()}
        methods = ("ours", "autograd") if arguments.quick else ("ours", *PEERS)
        workers = {method: Worker(WORKER, method, Path(folder)) for method in methods}
        about = {
            "date": date.today().isoformat(), "cpu": cpu_model(), "cores": os.cpu_count(), "threads": THREADS,
            "python": platform.python_version(), "system": platform.system(), "gpu": workers["ours"].about["gpu"],
            "versions": {name: v for worker in workers.values() for name, v in worker.about["versions"].items()},
            "torch_build": [line.strip() for line in torch.__config__.show().splitlines() if "=" not in line],
        }  # fmt: skip
        rounds = 2 if arguments.quick else ROUNDS
        results = {"environment": about, "rounds": rounds, "bandwidth": workers["ours"](what="bandwidth"), "rows": []}
        for case in CASES:
            for name, some in tokens.items():
                print(f"{time.perf_counter() - began:5.0f} s  {case}, {name}", flush=True)
                results["rows"].append(measure(workers, name, some, case, rounds))
        for worker in workers.values():
            worker.close()
        size = {"tokens": 512, "vocab": 1_000 if arguments.quick else 49_152}
        fresh = Worker(WORKER, "ours", Path(folder))
        results["memory"] = {**size, **fresh(what="memory", **size)}
        fresh.close()

    results["growth"] = {}
    for case in CASES:
        rows = [row for row in results["rows"] if row["objective"] == case and row["set"].startswith("V")]
        points = [(math.log(row["vocab"]), math.log(milliseconds(row, "ours, batched"))) for row in rows]
        if len(points) > 1:
            results["growth"][case] = float(np.polyfit(*np.array(points).T, 1)[0])
    results["minutes"] = (time.perf_counter() - began) / 60
    text = report(results)
    print(f"\n{text}\n")
    if out is not None:
        out.write_text(json.dumps(results, indent=1) + "\n")
        print(out.name)
    if out == HERE / "logit_hessian.json":
        update_readme("logit_hessian", text)
