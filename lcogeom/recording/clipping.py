"""The gradient's norm before clipping, from the norm after it: a few entries of each parameter tell what happened.

The optimiser's step is the one moment at which every engine (DDP, FSDP2, loss scalers, accumulation) has the whole
gradient in place, but by then it may be clipped. So at the end of each backward pass a few entries of every gradient
are kept; at the step the same entries show by how much it was multiplied since.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lcogeom.recording.ranks import local_gradient

PLACES, RUN = 8, 8  # of each parameter, so many entries side by side: what costs is the way to each place in memory
ELEMENTWISE = 1e-2  # relative distance from one common multiple beyond which it was no scaling; bf16 rounds to 4e-3


class ScalingWatch:
    """What every gradient was multiplied by between the end of the backward pass and the step."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._places: list[int] = []
        self._entries: Tensor | None = None

    def look(self) -> None:
        """At the end of a backward pass."""
        self._places = [place for place, parameter in enumerate(self._parameters) if parameter.grad is not None]
        self._entries = self._read(self._places)

    def gone(self) -> bool:
        """Whether a gradient seen at the last look is no longer there."""
        return any(self._parameters[place].grad is None for place in self._places)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(factor of each parameter's gradient since the last look (P,) float64, whether it was a scaling (); or None.

        Parameters whose entries were all zero, or that had no gradient, are given the factor of all together.
        """
        if self._entries is None or self.gone():
            return None
        before, after = self._entries, self._read(self._places)
        along, square = (after * before).sum(1), before.square().sum(1)
        common = along.sum() / square.sum()
        own = torch.where(square > 0, along / square, common)
        missed = (after - own[:, None] * before).norm() / after.norm()
        plain = ~(missed >= ELEMENTWISE)  # NaN: nothing there, or nothing finite
        found = common.nan_to_num(nan=1.0).expand(len(self._parameters)).clone()
        found[self._places] = torch.where((square.sum() == 0) | own.isnan(), torch.ones_like(own), own)
        self._entries = None
        return found, plain

    def _read(self, places: Sequence[int]) -> Tensor:
        """(len(places), PLACES * RUN) float64, zeros where a gradient has fewer."""
        device, most = self._parameters[0].device, PLACES * RUN
        views = []
        for place in places:
            gradient = local_gradient(self._parameters[place])
            assert gradient is not None
            flat = gradient if gradient.is_contiguous() else gradient.reshape(-1)
            count = flat.numel()
            if count > most:
                few = flat.as_strided((PLACES, RUN), (count // PLACES, 1), flat.storage_offset())
            else:
                few = torch.nn.functional.pad(flat.reshape(-1), (0, most - count)).view(PLACES, RUN)
            views.append(few if few.device == device else few.to(device))
        none = torch.zeros(0, RUN, device=device)
        return torch.cat([none, *views]).view(-1, most).double()
