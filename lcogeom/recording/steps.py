"""What a step did to the parameters: from copies of them, exactly, or from sketches of them, at no memory to speak of.

Both are told when the step is about to come and when it has come, and answer with 0-d tensors and sketches on the
parameters' device. Neither waits for the device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lcogeom.geometry.sketch import LinearSketch
from lcogeom.recording.norms import squared_norm, stretches
from lcogeom.recording.ranks import Ranks, first_row, local
from lcogeom.recording.threads import side_by_side

SEED = 0  # one for all runs: their sketches are comparable
WATCHED = 16  # elements of each parameter
PIECE = 2**20  # elements looked at together: several passes over 4 MiB cost one pass over memory

StoredSketch = tuple[str, str | None, Tensor]
"""(vector: 'gradient', 'step' or 'weights'; layer, None for the whole; (size,) float32)."""


@dataclass(frozen=True, eq=False)
class StepFound:
    """What is known of one step."""

    values: dict[str, Tensor]
    """Columns of `updates`."""
    squares: dict[tuple[str, str], Tensor]
    """(scope, name) of each row of `norms` -> squared norm of its part of the step; empty where not known."""
    weights: dict[tuple[str, str], Tensor]
    """The same of the weights before the step."""
    between: dict[tuple[str, str], Tensor]
    """The same of what changed the weights since the last step; empty where that is not known."""
    sketches: list[StoredSketch]


Visit = Callable[[int, Tensor], None]
"""Called with a parameter's place and each stretch of its gradient, in order, when that is about to be read: what is
read twice at once is read faster. One parameter's by one thread, but not always by the same."""


class StepWatch(Protocol):
    """Told of every step."""

    def before(self, visit: Visit) -> dict[str, Tensor]:
        """The gradient is in place; visits that of each parameter, and returns columns of `updates`."""

    def after(self) -> StepFound:
        """The step has been made."""


class CopiedSteps:
    """Keeps one copy of the parameters and one of their gradient."""

    def __init__(
        self, parameters: Sequence[Tensor], members: dict[tuple[str, str], list[int]], sketch: Sketcher | None
    ) -> None:
        self._parameters, self._members, self._sketch = parameters, members, sketch
        self._copies: list[Tensor] = []
        self._gradient: list[Tensor | None] = [None] * len(parameters)
        self._first: list[StoredSketch] = []

    def before(self, visit: Visit) -> dict[str, Tensor]:
        if not self._copies:
            self._copies = [torch.empty_like(_flat(parameter)) for parameter in self._parameters]
            self._first = [] if self._sketch is None else self._sketch.store("weights", self._parameters)
        now, last, along = _Sum(), _Sum(), _Sum()
        comparable = True  # with the last update: every gradient here was there too
        for place, parameter in enumerate(self._parameters):
            self._copies[place].copy_(_flat(parameter))
            gradient, kept = parameter.grad, self._gradient[place]
            for stretch in [] if gradient is None else stretches(local(gradient)):
                visit(place, stretch)
            if gradient is None:
                self._gradient[place] = None
                continue
            if kept is None:
                kept = self._gradient[place] = torch.zeros_like(_flat(gradient))
                comparable = False
            for new, old in _pieces(_flat(gradient), kept):
                if comparable:
                    now.add(squared_norm(new))
                    last.add(squared_norm(old))
                    along.add(_dot(new, old))
                old.copy_(new)
        return {"grad_cos_prev": along.total() / (now.root() * last.root())} if comparable and along.terms else {}

    def after(self) -> StepFound:
        steps, weights = [_Sum() for _ in self._parameters], [_Sum() for _ in self._parameters]
        forces, along = _Sum(), _Sum()
        for place, parameter in enumerate(self._parameters):
            for before, after, force in _pieces(self._copies[place], _flat(parameter), self._gradient[place]):
                weights[place].add(squared_norm(before))
                backwards = before.sub_(after)
                steps[place].add(squared_norm(backwards))
                if force is not None:
                    forces.add(squared_norm(force))
                    along.add(_dot(backwards, force))
        norm = torch.stack([step.total() for step in steps]).sum().sqrt()
        values = {"update_norm": norm, "weight_norm": torch.stack([part.total() for part in weights]).sum().sqrt()}
        if forces.terms:
            values["step_grad_cos"] = along.total() / (norm * forces.root())
        squares, old = (
            {key: torch.stack([sums[place].total() for place in places]).sum() for key, places in self._members.items()}
            for sums in (steps, weights)
        )
        sketches: list[StoredSketch] = []
        if self._sketch is not None:
            sketches = self._first + self._sketch.store("gradient", self._gradient)
            sketches += self._sketch.store("step", self._copies, sign=-1.0)  # they hold theta_old - theta_new now
            self._first = []
        return StepFound(values, squares, old, {}, sketches)


class SketchedSteps:
    """Keeps sketches: of the weights, in float64, whose difference is the step's, and of the gradient."""

    def __init__(
        self, parameters: Sequence[Tensor], members: dict[tuple[str, str], list[int]], sketch: Sketcher
    ) -> None:
        self._parameters, self._sketch = parameters, sketch
        names: list[list[tuple[str, str]]] = [[] for _ in parameters]
        for key, places in members.items():
            for place in places:
                names[place].append(key)
        cells = defaultdict(list)  # parameters that are always counted together
        for place, keys in enumerate(names):
            cells[tuple(keys)].append(place)
        self._cells = dict(cells)
        self._weights: Tensor | None = None  # (cells, size) float64
        self._seen: list[tuple[int, int]] = []
        self._entries: Tensor | None = None  # a few of each parameter, after the last step
        self._unsure: Tensor | None = None  # on a GPU: whether they were others before this one
        self._gradient: Tensor | None = None
        self._stored: list[StoredSketch] = []
        self._step: Tensor | None = None  # (cells, size), of the last one
        self._squares: Tensor | None = None  # (cells,), of it
        self._still = False  # nothing has changed the weights since
        self._between: Tensor | None = None  # (cells, size): what has, where it is known

    def before(self, visit: Visit) -> dict[str, Tensor]:
        first = self._weights is None
        self._still, self._between = self._untouched(), None
        if self._weights is None or not self._still:  # someone else has changed the weights
            last_weights, self._weights = self._weights, self._sketch_weights()
            self._between = None if last_weights is None else self._weights - last_weights
        self._stored = self._sketch.store("gradient", [part.grad for part in self._parameters], visit=visit)
        if first:
            self._stored += self._by_layer("weights", self._weights)
        last, self._gradient = self._gradient, next(part for _, layer, part in self._stored if layer is None)
        return {} if last is None else {"grad_cos_prev": _cosine(self._gradient, last)}

    def after(self) -> StepFound:
        assert self._weights is not None
        assert self._gradient is not None
        before, self._weights = self._weights, self._sketch_weights()
        if self._unsure is not None:
            before = torch.where(self._unsure, torch.nan, before)
        self._seen, self._entries = self._versions(), self._read()
        weights = _squares(before)
        step = torch.sub(self._weights, before, out=before)
        norms = _squares(step)
        values = {
            "update_norm": norms.sum().sqrt(),
            "weight_norm": weights.sum().sqrt(),
            "step_grad_cos": _cosine(step.sum(0), -self._gradient.double()),
        }
        squares, old = self._by_key(norms), self._by_key(weights)
        between: dict[tuple[str, str], Tensor] = {}
        if self._step is not None and self._squares is not None:
            last, length = self._step.flatten(), self._squares.sum()
            values["step_cos_prev"] = torch.dot(step.flatten(), last) / (norms.sum() * length).sqrt()
            if self._still or self._between is not None:
                moved = self._between
                changed = torch.zeros_like(norms) if moved is None else _squares(moved)
                undone = torch.zeros_like(length) if moved is None else -torch.dot(moved.flatten(), last)
                between = self._by_key(changed)
                values["moved_between"] = changed.sum().sqrt()
                values["step_undone"] = undone / length
        self._step, self._squares = step, norms
        return StepFound(values, squares, old, between, self._stored + self._by_layer("step", step))

    def _by_key(self, cells: Tensor) -> dict[tuple[str, str], Tensor]:
        sums: dict[tuple[str, str], Tensor] = {}
        for row, keys in enumerate(self._cells):
            for key in keys:
                sums[key] = sums[key] + cells[row] if key in sums else cells[row]
        return sums

    def _sketch_weights(self) -> Tensor:
        """(cells, size) float64."""
        return torch.stack(self._sketch.parts(self._parameters, list(self._cells.values()), torch.float64))

    def _by_layer(self, vector: str, cells: Tensor) -> list[StoredSketch]:
        found: list[StoredSketch] = []
        if self._sketch.by_layer:
            layers = [self._sketch.layers[places[0]] for places in self._cells.values()]
            for layer in dict.fromkeys(layers):
                rows = [row for row, name in enumerate(layers) if name == layer]
                found.append((vector, layer, cells[rows].sum(0).float()))
        return [*found, (vector, None, cells.sum(0).float())]

    def _untouched(self) -> bool:
        """Whether nothing has changed the weights since the last step, as far as is known without waiting.

        Changes of `.data` leave no trace but in the values: a few of each parameter are compared. On a GPU the answer
        comes too late to take another sketch; what it concerns is NaN then.
        """
        self._unsure = None
        if self._entries is None or self._seen != self._versions():
            return False
        differ = (self._read() != self._entries).any()
        if differ.device.type == "cpu":
            return not bool(differ)
        self._unsure = differ
        return True

    def _read(self) -> Tensor:
        # No view is kept: it would hold memory that the loop frees by moving the weights elsewhere while it samples.
        device = self._parameters[0].device
        some = (_some(local(parameter)) for parameter in self._parameters)
        return torch.cat([few if few.device == device else few.to(device) for few in some])

    def _versions(self) -> list[tuple[int, int]]:
        return [(part._version, part.data_ptr()) for part in map(local, self._parameters)]


class Sketcher:
    """Sketches lists of tensors shaped like the parameters (None stands for zeros), whole or by layer too."""

    def __init__(
        self, parameters: Sequence[Tensor], layers: Sequence[str], size: int, by_layer: bool, ranks: Ranks
    ) -> None:
        """layers: of each parameter. by_layer: store each layer's sketch too; all of them add up to the whole's."""
        if size < 2:
            raise ValueError(f"sketch: {size}; must be at least 2, or 0 for none.")
        self.layers, self.by_layer, self._ranks = layers, by_layer, ranks
        self._size, self._device = size, parameters[0].device
        wide = [parameter for parameter in parameters if parameter.dtype == torch.float64]
        self._read = torch.float64 if wide else torch.float32
        self._kept: dict[tuple[object, ...], LinearSketch] = {}  # (dtype, places) -> the sketch of that part
        self._starts = [0]
        for parameter in parameters:
            self._starts.append(self._starts[-1] + parameter.numel())

    def store(
        self, vector: str, tensors: Sequence[Tensor | None], sign: float = 1.0, visit: Visit | None = None
    ) -> list[StoredSketch]:
        """The sketches of one vector."""
        places = defaultdict(list)
        for place, layer in enumerate(self.layers):
            places[layer].append(place)
        parts = sign * torch.stack(self.parts(tensors, list(places.values()), torch.float32, visit))
        found: list[StoredSketch] = []
        if self.by_layer:
            found = [(vector, layer, part) for layer, part in zip(places, parts, strict=True)]
        return [*found, (vector, None, parts.sum(0))]

    def parts(
        self,
        tensors: Sequence[Tensor | None],
        parts: Sequence[list[int]],
        dtype: torch.dtype,
        visit: Visit | None = None,
    ) -> list[Tensor]:
        """The sketch of the tensors at each part's places, (size,) of that dtype."""

        def work(places: list[int]) -> Tensor:
            key = (dtype, *places)
            if key not in self._kept:
                self._kept[key] = LinearSketch(
                    self._size, SEED, self._device, dtype, self._read if dtype == torch.float64 else dtype
                )
            total = self._kept[key]
            total.clear()
            for place in places:
                tensor = tensors[place]
                if tensor is None:
                    continue
                part, first = local(tensor), first_row(tensor)
                start = self._starts[place] + (first * part[:1].numel() if first else 0)
                for stretch in stretches(part):
                    if visit is not None:
                        visit(place, stretch)
                    if self._ranks.counts(tensor):
                        total.add(stretch, start)
                    start += stretch.numel()
            return total.result()

        found = side_by_side(work, parts, self._starts[-1] if self._device.type == "cpu" else 0)
        return list(self._ranks.total(torch.stack(found))) if self._ranks.sharded else found


class _Sum:
    """A sum of 0-d tensors, kept on their device and added in float64 at the end."""

    def __init__(self) -> None:
        self.terms: list[Tensor] = []

    def add(self, term: Tensor) -> None:
        self.terms.append(term)

    def total(self) -> Tensor:
        return torch.stack(self.terms).double().sum() if self.terms else torch.zeros((), dtype=torch.float64)

    def root(self) -> Tensor:
        return self.total().sqrt()


def _pieces(*tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The same stretch of each flat tensor, small enough that what follows finds it in the cache; None stays None."""
    assert tensors[0] is not None
    for start in range(0, len(tensors[0]), PIECE):
        yield tuple(None if tensor is None else tensor[start : start + PIECE] for tensor in tensors)


def _some(tensor: Tensor) -> Tensor:
    """A view of a few of its elements, (n,)."""
    if not tensor.is_contiguous():
        return tensor[(slice(0, 1),) * tensor.ndim].reshape(-1)
    count = tensor.numel()
    if count <= WATCHED:
        return tensor.reshape(-1)
    return tensor.as_strided((WATCHED,), (count // WATCHED,), tensor.storage_offset())


def _squares(cells: Tensor) -> Tensor:
    """(cells,): squared norm of each row; their sum is exacter than the whole's, as the rows' errors average out."""
    return torch.linalg.vector_norm(cells, dim=1).square()


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    precise = torch.promote_types(a.dtype, torch.float32)
    return torch.dot(a.to(precise), b.to(precise))


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.double(), b.double()
    return (a @ b) / (a.norm() * b.norm())
