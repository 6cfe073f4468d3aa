"""A small recorded run that explodes, written by a model whose vocabulary would like to be HTML."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers

import lcogeom as lg
from lcogeom.diagnosis import Evidence, Finding, Missing, Report
from tests.small_models import build, loss_of, make_task, tell

HOSTILE = (
    "<script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked = 2">',
    "</style><style>body{display:none}</style>",
    "' onpointermove='window.hacked = 3",
    "&lt;b&gt;",
    "a|b",
    "\u202eabc",
    "\n",
    "\t ",
    "\x00\x1b[2J",
    "]]>--><!--",
    "عربي",
)
AT, UPDATES = 8, 12


def tokenizer(size: int) -> transformers.PreTrainedTokenizerFast:
    """One word for each id; the first are HOSTILE."""
    words = {word: place for place, word in enumerate([*HOSTILE, *(f"w{n}" for n in range(size - len(HOSTILE)))])}
    model = tokenizers.models.WordLevel(words, unk_token="w0")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model))


def record(folder: Path, *, at: int = AT, seed: int = 0) -> lg.Run:
    """PPO on one batch of random completions, drawn by `seed`; the learning rate of update `at` is 3."""
    model = build("llama", torch.device("cpu"))
    task = make_task(model, sequences=4, length=16, seed=seed)
    order = torch.arange(int(task.mask.sum())) % len(HOSTILE)
    task.input_ids[task.mask] = order  # every hostile token is in a completion
    objective = lg.objective("ppo")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    with (
        warnings.catch_warnings(),
        lg.attach(
            model,
            optimizer,
            folder,
            objective=objective,
            tokenizer=tokenizer(41),
            flush_every=None,
            black_box_weights=True,
        ) as probe,
    ):
        warnings.filterwarnings("ignore", "black box")
        for update in range(UPDATES):
            optimizer.param_groups[0]["lr"] = 3.0 if update == at else 1e-4
            loss = loss_of(model, task, objective)
            tell(probe, task, loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return lg.load_run(folder)


def report_of(run: lg.Run) -> Report:
    """A report by hand, of the run's own numbers."""
    updates, tokens = run.updates, run.tokens
    norms = updates["update_norm"].to_numpy()
    heaviest = tokens[tokens["step"] == AT + 1].sort_values("logit_grad_norm", ascending=False).head(10)
    squares = heaviest["logit_grad_norm"] ** 2
    step = Evidence(
        "updates", "update_norm", AT, norms[AT], float(np.median(norms[:AT])), "norm of the step, far above its median"
    )
    after = Evidence("updates", "tokens", AT + 1, 1.0, None, "completion tokens")
    return Report(
        str(run.path),
        len(updates),
        (
            Finding("step-too-large", AT, 0.9, "A step.", "A smaller step.", (step,), where="model.layers.1"),
            Finding(
                "ratio-blow-up",
                AT + 1,
                0.8,
                f"It wrote {HOSTILE[0]}.",
                "Clip.",
                (after,),
                share=0.5,
                where=HOSTILE[1],
                tokens=heaviest.assign(share=squares / squares.sum()),
                follows="step-too-large",
            ),
        ),
        (Missing("updates", "learning_rate", "step-too-large", "note it"),),
        ("a note with </main> in it",),
        run.meta,
    )
