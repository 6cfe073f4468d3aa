"""Sketches of one update's gradient and step, whole or by layer too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lcogeom.geometry.sketch import LinearSketch

SEED = 0  # one for all runs: their sketches are comparable


class UpdateSketches:
    """Adds up sketches while the meter passes over the parameters. Results stay on their device: no sync here."""

    def __init__(self, parameters: Sequence[Tensor], layers: Sequence[str], size: int, by_layer: bool) -> None:
        """layers: of each parameter. by_layer: keep each layer's sketch too; all of them add up to the whole's."""
        if size < 2:
            raise ValueError(f"sketch: {size}; must be at least 2, or 0 for none.")
        self._layers: Sequence[str | None] = layers if by_layer else [None] * len(parameters)
        self._size, self._device = size, parameters[0].device
        self._starts = [0]
        for parameter in parameters:
            self._starts.append(self._starts[-1] + parameter.numel())
        self._sums: dict[tuple[str, str | None], LinearSketch] = {}
        self._signs: dict[str, float] = {}

    def add(self, vector: str, place: int, values: Tensor, sign: float = 1.0) -> None:
        """Add the part of a vector that belongs to one parameter, times the sign (one for a vector)."""
        self._signs[vector] = sign
        key = vector, self._layers[place]
        if key not in self._sums:
            self._sums[key] = LinearSketch(self._size, SEED, self._device)
        self._sums[key].add(values, self._starts[place])

    def take(self) -> list[tuple[str, str | None, Tensor]]:
        """(vector, layer or None for the whole, sketch) since the last call. A vector never added to is zero."""
        found: list[tuple[str, str | None, Tensor]] = []
        for vector in dict.fromkeys(("gradient", "step", *self._signs)):
            parts = {layer: self._part(vector, layer) for layer in dict.fromkeys(self._layers)}
            if None not in parts:
                parts[None] = torch.stack(list(parts.values())).sum(0)
            found += [(vector, layer, part) for layer, part in parts.items()]
        self._sums.clear()
        self._signs.clear()
        return found

    def _part(self, vector: str, layer: str | None) -> Tensor:
        total = self._sums.get((vector, layer))
        if total is None:
            return torch.zeros(self._size, device=self._device)
        return self._signs[vector] * total.result()
