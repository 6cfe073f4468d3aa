"""What the user says of one backward pass."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lcogeom.objectives import TokenBatch


class BatchRecord:
    """The arguments of one `Probe.batch` call, checked: shapes, completion tokens, finite values."""

    def __init__(self, input_ids: Tensor, given: Mapping[str, Tensor | None], old_logits: Tensor | None) -> None:
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise ValueError(f"input_ids: shape {tuple(input_ids.shape)} {input_ids.dtype}; must be (B, T) token ids.")
        for name, value in given.items():
            wide = name == "advantage_ids" or (name == "advantages" and given["advantage_ids"] is not None)
            if value is not None and (value.ndim != 2 + wide or value.shape[:2] != input_ids.shape):
                raise ValueError(
                    f"{name}: shape {tuple(value.shape)}; must be {tuple(input_ids.shape)}{' + (K,)' if wide else ''} "
                    "like input_ids: entry t belongs to the token input_ids[:, t]."
                )
        self.input_ids = input_ids
        mask = given["action_mask"]
        self.mask = None if mask is None else mask.bool()
        self.fields = {name: value for name, value in given.items() if value is not None and name != "action_mask"}
        self.old_logits = old_logits
        if self.mask is None:
            if old_logits is not None:
                raise ValueError("old_logits: its rows follow action_mask; pass action_mask too.")
            return
        sequence, place = self.mask.nonzero(as_tuple=True)
        if len(place) == 0:
            raise ValueError("action_mask: no completion token is marked in any sequence. Check how it was built.")
        if int(place.min()) == 0:
            raise ValueError("action_mask: it marks the first token of a sequence, which no logits predict.")
        if old_logits is not None and (old_logits.ndim != 2 or len(old_logits) != len(place)):
            raise ValueError(
                f"old_logits: shape {tuple(old_logits.shape)}; must be ({len(place)}, V), one row for each true entry "
                "of action_mask."
            )
        everything = torch.arange(len(place), device=place.device)
        self.rows(
            sequence, place, everything, input_ids[sequence, place]
        )  # TokenBatch names what is wrong with the values

    def rows(self, sequence: Tensor, place: Tensor, rows: Tensor, actions: Tensor) -> TokenBatch | None:
        """The fields at some tokens, whose places among the mask's true entries are `rows`."""
        if len(actions) == 0:
            return None
        device = actions.device
        picked = {name: value.to(device)[sequence.to(device), place.to(device)] for name, value in self.fields.items()}
        logits = None if self.old_logits is None else self.old_logits.to(device)[rows]
        return TokenBatch(actions, old_logits=logits, **picked)
