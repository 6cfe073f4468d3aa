"""The recorded tokens of an update that contribute most to its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

COUNT = 10


def heaviest_tokens(
    step: int, parts: Sequence[Mapping[str, Tensor]], text: Callable[[int], str | None]
) -> list[dict[str, object]]:
    """At most ten, from the largest gradient with respect to the logits down; those without a finite one first.

    Args:
        parts: columns of the tokens table (runs/columns.py), for each pass of the update.
        text: token id -> its text.

    Returns:
        Rows with step, sequence, position, token_id, text, logprob, logit_grad_norm, and share: of the sum over all
        completion tokens of the squared norm; NaN where that sum is not finite. Waits for the device.
    """
    if not parts:
        return []
    names = ("sequence", "position", "token_id", "weight", "logprob", "logit_grad_norm")
    columns = {name: torch.cat([part[name] for part in parts]).cpu() for name in names}
    norms = columns["logit_grad_norm"].double()
    total = float((columns["weight"] * norms.square()).sum())
    order = norms.nan_to_num(nan=math.inf, posinf=math.inf).argsort(descending=True, stable=True)[:COUNT]
    rows: list[dict[str, object]] = []
    for row in order.tolist():
        norm = float(norms[row])
        token = int(columns["token_id"][row])
        rows.append(
            {
                "step": step,
                "sequence": int(columns["sequence"][row]),
                "position": int(columns["position"][row]),
                "token_id": token,
                "text": text(token),
                "logprob": float(columns["logprob"][row]),
                "logit_grad_norm": norm,
                "share": norm**2 / total if total > 0 else math.nan,
            }
        )
    return rows
