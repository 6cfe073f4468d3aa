"""Small logged batches with their logits kept aside, and the files they are written to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch

LENGTHS = (5, 1, 7, 3, 12, 4)


def logged_tokens(vocab: int = 4, *, spread: float = 2.0, seed: int = 0) -> tuple[torch.Tensor, pd.DataFrame]:
    """(logits (N, V) float64, one row per token: sequence, position, token_id, text and what a trainer logs)."""
    rng = torch.Generator().manual_seed(seed)
    count = sum(LENGTHS)
    logits = spread * torch.randn(count, vocab, generator=rng, dtype=torch.float64)
    actions = torch.randint(vocab, (count,), generator=rng)
    logprobs = torch.log_softmax(logits, 1).gather(1, actions[:, None]).squeeze(1)
    noise = torch.randn(3, count, generator=rng, dtype=torch.float64)
    sequence = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    frame = pd.DataFrame(
        {
            "sequence": sequence,
            "position": np.concatenate([np.arange(length) for length in LENGTHS]),
            "token_id": actions.numpy(),
            "text": [f"<{action}>" for action in actions.tolist()],
            "logprobs": logprobs.numpy(),
            "old_logprobs": np.minimum((logprobs + 0.25 * noise[0]).numpy(), 0.0),
            "ref_logprobs": np.minimum((logprobs + 0.5 * noise[1]).numpy(), 0.0),
            "advantages": noise[2].numpy()[sequence].round(3),
        }
    )
    frame.loc[frame["sequence"] == 1, "advantages"] = 0.0
    return logits, frame


def as_lists(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per sequence: cells are lists, the advantage is one number."""
    groups = frame.groupby("sequence")
    lists = {name: [part.tolist() for _, part in groups[name]] for name in frame if name != "sequence"}
    return pd.DataFrame(lists | {"advantages": groups["advantages"].first().tolist(), "sequence": list(groups.groups)})


def write(frame: pd.DataFrame, path: Path) -> Path:
    """In the format that the file's name says, floats to their last bit."""
    if path.suffix == ".parquet":
        frame.to_parquet(path, index=False)
    elif path.suffix == ".csv":
        cells = frame.map(lambda cell: json.dumps(cell) if isinstance(cell, list) else cell)
        cells.to_csv(path, index=False)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in frame.to_dict("records")))
    return path
