"""What does a rollout's buffer take for LCO: hidden states and a head, against old logits as they are?

    python analysis/benchmarks/rollout_buffer.py           (1 minute on 2 cores, 8 GiB of memory)
    python analysis/benchmarks/rollout_buffer.py --quick   (15 seconds: one small measurement, nothing written)

Computed for Qwen2.5-3B's vocabulary and width; measured on small random Llamas with the same vocabulary, each in a fresh
process, as the growth of its resident set. Writes rollout_buffer.json and analysis/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch
import transformers
from report import HERE, cpu_model, update_readme

from lcogeom.training import Sequences, keep_old_policy

VOCABULARY, WIDTH = 151_936, 2048  # Qwen2.5-3B
TOKENS = (16_384, 65_536, 262_144, 1_048_576, 4_194_304)
BESIDE = 5  # bytes a token: its old log-probability and its place in the mask
GOAL = 40
MEASURED = ((64, 4096), (64, 8192), (256, 8192))  # width, completion tokens
PROMPT, COMPLETION = 16, 128
MARK = "rollout buffer"


def stored_bytes(tokens: int, size: int, vocabulary: int = VOCABULARY) -> int:
    """Of [tokens, V] logits."""
    return tokens * (vocabulary * size + BESIDE)


def kept_bytes(tokens: int, size: int, heads: float, vocabulary: int = VOCABULARY, width: int = WIDTH) -> float:
    """Of hidden states and so many copies of the head; a share of one where FSDP2 shards it."""
    return tokens * (width * size + BESIDE) + heads * vocabulary * width * size


def fewest_tokens(size: int, logit_size: int, heads: float) -> int | None:
    """From how many tokens on the buffer is GOAL times smaller."""
    per_token = stored_bytes(1, logit_size) - GOAL * kept_bytes(1, size, 0)
    if per_token <= 0:
        return None
    exact = GOAL * kept_bytes(0, size, heads) / per_token
    return max(1, -int(-exact // 1))


def resident(which: str) -> int:
    """Bytes of the resident set: VmRSS now, VmHWM at its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return 1024 * int(line.split()[1])


def measure(how: str, width: int, tokens: int) -> dict[str, int]:
    """Growth of this process's resident set by a rollout's buffer, in bytes: what stays, and the peak on the way."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    sequences = batch(tokens // COMPLETION)
    if how == "stored":
        keep_logits(model, batch(1))
    else:
        keep_old_policy(model, batch(1))  # what happens only once
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    kept = keep_logits(model, sequences) if how == "stored" else keep_old_policy(model, sequences)
    found = {"counted": kept.nbytes, "kept": resident("VmRSS") - before, "peak": resident("VmHWM") - before}
    del kept
    return found


def batch(rows: int) -> Sequences:
    length = PROMPT + COMPLETION
    ids = torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, PROMPT:] = True
    return Sequences(ids, torch.ones_like(ids), mask, PROMPT)


@torch.no_grad()
def keep_logits(model: transformers.PreTrainedModel, sequences: Sequences) -> torch.Tensor:
    """The plain way: (M, V) float32, filled sequence by sequence."""
    stored = torch.empty(int(sequences.action_mask.sum()), VOCABULARY)
    for row, ids in enumerate(sequences.input_ids):
        logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=COMPLETION + 1).logits[0, :-1]
        stored[row * COMPLETION : (row + 1) * COMPLETION] = logits
    return stored


def in_a_process(how: str, width: int, tokens: int) -> dict[str, int]:
    command = [sys.executable, __file__, "--measure", how, str(width), str(tokens)]
    # Large blocks go back to the system as soon as they are freed, so that what stays is what is held.
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "MALLOC_MMAP_THRESHOLD_": "65536"}
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def computed() -> list[dict]:
    rows = []
    for tokens in TOKENS:
        row = {"tokens": tokens}
        for name, size in (("bf16", 2), ("float32", 4)):
            row[name] = {
                "logits": stored_bytes(tokens, size),
                "hidden": kept_bytes(tokens, size, 0),
                "hidden and head": kept_bytes(tokens, size, 1),
            }
        rows.append(row)
    return rows


def thresholds() -> dict[str, int | None]:
    """Fewest tokens on one process for GOAL, by what is compared with what and where the head is copied."""
    pairs = {"bf16, logits bf16": (2, 2), "float32, logits float32": (4, 4), "bf16, logits float32": (2, 4)}
    copies = {"one copy of the head": 1.0, "a copy sharded over 8 processes": 1 / 8, "head not trained": 0.0}
    return {f"{p}; {c}": fewest_tokens(*pairs[p], copies[c]) for p in pairs for c in copies}


def report(results: dict) -> str:
    about = results["environment"]
    lines = [
        f"{about['date']}, {about['cpu']}, torch {about['torch']}. V = {VOCABULARY:,}. GiB, and how many times less than "
        "the logits. A trained (or tied) head is copied once a process; LoRA on other modules copies none.",
        "",
        f"Computed for Qwen2.5-3B (d = {WIDTH:,}), hidden states and logits both in bf16; in float32 every size doubles "
        "and the ratios stay.",
        "",
        "| completion tokens | logits | hidden states and head | times less | head not trained | times less |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results["computed"]:
        sizes = row["bf16"]
        cells = [f"{row['tokens']:,}", f"{sizes['logits'] / 2**30:,.1f}"]
        for kind in ("hidden and head", "hidden"):
            cells += [f"{sizes[kind] / 2**30:,.2f}", f"{sizes['logits'] / sizes[kind]:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"At least {GOAL} times less from so many completion tokens on, in one process:", ""]
    lines += ["| hidden states | one copy of the head | copy sharded over 8 (FSDP2) | head not trained |"]
    lines += ["| --- | ---: | ---: | ---: |"]
    found = results["thresholds"]
    for pair in dict.fromkeys(key.split("; ")[0] for key in found):
        cells = [f"{found[key]:,}" for key in found if key.startswith(pair)]
        lines.append("| " + " | ".join([pair, *cells]) + " |")
    lines += [
        "",
        "Measured: growth of a fresh process's resident set, MiB, on random Llamas in float32 with a trained head. Kept: "
        "what stays; peak: on the way there, transient blocks of logits included; counted: `OldPolicy.nbytes`.",
        "",
        "| d | tokens | logits kept | logits peak | ours kept | ours peak | ours counted | times less, kept | peak |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results["measured"]:
        a, b = row["stored"], row["ours"]
        sizes = [a["kept"], a["peak"], b["kept"], b["peak"], b["counted"]]
        cells = [f"{row['width']}", f"{row['tokens']:,}", *(f"{size / 2**20:,.0f}" for size in sizes)]
        cells += [f"{a['kept'] / b['kept']:.0f}", f"{a['peak'] / b['peak']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small measurement, nothing written")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure[0], *map(int, arguments.measure[1:]))))
        sys.exit()
    measured = []
    for width, tokens in ((64, 512),) if arguments.quick else MEASURED:
        found = {how: in_a_process(how, width, tokens) for how in ("stored", "ours")}
        measured.append({"width": width, "tokens": tokens, **found})
        print(measured[-1], flush=True)
    about = {"date": date.today().isoformat(), "cpu": cpu_model(), "torch": torch.__version__}
    about |= {"system": platform.system(), "transformers": transformers.__version__}
    results = {"environment": about, "computed": computed(), "thresholds": thresholds(), "measured": measured}
    text = report(results)
    print(f"\n{text}\n")
    if not arguments.quick:
        (HERE / "rollout_buffer.json").write_text(json.dumps(results, indent=1) + "\n")
        update_readme(MARK, text)
