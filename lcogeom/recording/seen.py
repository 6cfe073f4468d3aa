"""What the taps saw of one update, in all processes together, on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lcogeom.recording.ranks import Ranks
from lcogeom.recording.under_way import UnderWay
from lcogeom.runs.columns import COLUMNS

NAMES = [c.name for c in COLUMNS if c.table == "tokens" and c.name not in ("step", "text")] + ["contradicts"]
WHOLE = ("sequence", "position", "token_id")  # numbers that are integers


@dataclass(frozen=True, eq=False)
class Seen:
    """Of one update."""

    tokens: dict[str, np.ndarray]
    """Columns of the tokens table and `contradicts`; empty where no token was seen."""
    loss: float | None
    count: int
    """Completion tokens."""
    mismatch: bool
    """Whether batch() was given other input ids than the model saw."""
    outside_share: float | None
    """Of the squared norm of the gradient; None where no completion tokens were marked."""


def together(ranks: Ranks, update: UnderWay) -> Seen:
    """Wait for the device, and for the other processes, which call this for the same update."""
    losses = [float(loss) for loss in update.losses]
    loss = sum(losses) / (1 if update.summed else len(losses)) if losses else None
    mismatch = any(bool(found) for found in update.mismatches)
    inside, everywhere = torch.stack(update.inside).sum(0).tolist() if update.inside else (0.0, 0.0)
    parts = update.measured
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}
    if ranks.size == 1:
        tokens = {name: column.cpu().numpy() for name, column in columns.items()}
        return Seen(tokens, loss, update.tokens, mismatch, _outside(inside, everywhere))

    numbers = [update.tokens, update.sequences, mismatch, loss is not None, 0.0 if loss is None else loss]
    numbers += [inside, everywhere]
    facts = torch.cat(ranks.gather(torch.tensor([numbers], dtype=torch.float64)))  # (processes, 7)
    everyones = ranks.gather_columns(columns, NAMES)
    shift = 0
    for rank, theirs in enumerate(everyones):  # sequences are counted through the processes
        theirs["sequence"] = theirs["sequence"] + shift
        shift += int(facts[rank, 1])
    joined = {name: torch.cat([theirs[name] for theirs in everyones]).numpy() for name in NAMES}
    for name in WHOLE:
        joined[name] = joined[name].astype(np.int64)
    joined["contradicts"] = joined["contradicts"] > 0
    known = facts[:, 3].sum()
    return Seen(
        joined if len(joined["sequence"]) else {},
        float(facts[:, 4].sum() / known) if known else None,
        int(facts[:, 0].sum()),
        bool(facts[:, 2].any()),
        _outside(float(facts[:, 5].sum()), float(facts[:, 6].sum())),
    )


def _outside(inside: float, everywhere: float) -> float | None:
    return max(0.0, 1 - inside / everywhere) if everywhere > 0 else None
