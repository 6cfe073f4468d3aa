"""A batch of tokens, what every objective can do with it, and the registry of objectives by name."""

from __future__ import annotations

import difflib
import inspect
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import TypeVar

import torch
from torch import Tensor

from lcogeom.geometry.hessian import LogitHessian
from lcogeom.geometry.joint import JointHessian
from lcogeom.geometry.softmax import require_finite

LOGIT_FIELDS = ("old_logits", "ref_logits")


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """What is known of N completion tokens beside the policy's logits. Flat: sequences are already concatenated.

    Raises:
        ValueError: no token, a wrong length, a NaN or infinite advantage, a negative or repeated id. The message
            names the field.
    """

    actions: Tensor
    """Sampled token ids, (N,) integer."""
    advantages: Tensor | None = None
    """A of the sampled action, (N,); or of the ids in `advantage_ids`, (N, K)."""
    old_logprobs: Tensor | None = None
    """log-probability of the action under the behaviour policy, (N,), <= 0."""
    ref_logprobs: Tensor | None = None
    """log-probability of the action under the reference policy, (N,), <= 0."""
    mask: Tensor | None = None
    """Which tokens count, (N,); the loss of the others is 0. None: all of them."""
    old_logits: Tensor | None = None
    """The behaviour policy's logits, (N, V)."""
    advantage_ids: Tensor | None = None
    """Token ids that `advantages` belongs to, (N, K) integer; None: the sampled action alone."""
    ref_logits: Tensor | None = None
    """The reference policy's (or teacher's) logits, (N, V)."""
    sequences: Tensor | None = None
    """Which completion each token belongs to, (N,) integer; the tokens of a completion in their order."""
    pairs: Tensor | None = None
    """Which preference pair each token belongs to, (N,) integer."""
    chosen: Tensor | None = None
    """Whether the token belongs to the preferred answer of its pair, (N,) bool."""

    def __post_init__(self) -> None:
        if self.actions.ndim != 1:
            raise ValueError(f"actions: shape {tuple(self.actions.shape)}; must be (N,). Flatten it with your mask.")
        if len(self.actions) == 0:
            raise ValueError("actions: the batch holds no completion token. Check the completion mask.")
        if self.actions.is_floating_point() or self.actions.min() < 0:
            raise ValueError("actions: must be integer token ids >= 0. Mask out ignored labels such as -100 first.")
        count = len(self.actions)
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None or field.name == "actions":
                continue
            wide = field.name in (*LOGIT_FIELDS, "advantage_ids") or (
                field.name == "advantages" and self.advantage_ids is not None
            )
            if value.ndim != 1 + wide or len(value) != count:
                want = f"({count}, {'V' if field.name in LOGIT_FIELDS else 'K'})" if wide else f"({count},)"
                raise ValueError(
                    f"{field.name}: shape {tuple(value.shape)}; must be {want}, one entry for each of the "
                    f"{count} tokens in `actions`."
                )
            if value.is_floating_point() and field.name not in LOGIT_FIELDS and not bool(torch.isfinite(value).all()):
                token = int((~torch.isfinite(value)).reshape(count, -1).any(1).nonzero()[0])
                raise ValueError(f"{field.name}: NaN or infinite at token {token}. Check where it was computed.")
        if self.advantage_ids is not None:
            self._check_advantage_ids()

    def _check_advantage_ids(self) -> None:
        assert self.advantage_ids is not None
        if self.advantages is None or self.advantages.shape != self.advantage_ids.shape:
            got = None if self.advantages is None else tuple(self.advantages.shape)
            raise ValueError(
                f"advantages: shape {got}; must be that of advantage_ids {tuple(self.advantage_ids.shape)}."
            )
        ordered = self.advantage_ids.sort(dim=1).values
        if (ordered[:, 0] < 0).any() or (ordered[:, 1:] == ordered[:, :-1]).any():
            raise ValueError("advantage_ids: negative, or the same id twice for one token. Each id may appear once.")

    def __len__(self) -> int:
        return len(self.actions)

    def __getitem__(self, rows: Tensor | slice) -> TokenBatch:
        """The same fields for some of the tokens."""
        present = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        return replace(self, **{name: getattr(self, name)[rows] for name in present})

    def require(self, name: str, *needed: str) -> None:
        """Raise ValueError unless the named fields are there. `name`: the objective that needs them."""
        for field in needed:
            if getattr(self, field) is None:
                raise ValueError(f"{field}: objective {name!r} needs it; pass TokenBatch({field}=...).")

    def require_vocabulary(self, vocab: int) -> None:
        """Raise ValueError unless logits and advantage ids fit a vocabulary of `vocab`."""
        for field in LOGIT_FIELDS:
            value = getattr(self, field)
            if value is not None and value.shape[1] != vocab:
                raise ValueError(f"{field}: shape {tuple(value.shape)}; must be ({len(self)}, {vocab}).")
        if self.advantage_ids is not None and int(self.advantage_ids.max()) >= vocab:
            raise ValueError(f"advantage_ids: id {int(self.advantage_ids.max())} is not below V = {vocab}.")

    def masked(self, keep: Tensor) -> TokenBatch:
        """The same tokens with those where `keep`, (N,) bool, is off masked out as well."""
        return replace(self, mask=keep if self.mask is None else self.mask.bool() & keep)

    def kept(self, per_token: Tensor) -> Tensor:
        """`per_token`, (N,), with 0 where the mask is off."""
        return per_token if self.mask is None else torch.where(self.mask.bool(), per_token, 0)


class Objective(ABC):
    """A per-token loss of the logits. Advantages, old policy and target are held fixed in every derivative."""

    name: str
    options: Mapping[str, object]
    """The options it was built with, for the run's record."""

    @abstractmethod
    def loss(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        """Per-token loss, (N,), differentiable; float32 unless the logits are float64. logits: (N, V)."""

    @abstractmethod
    def gradient(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        """d loss_n / d logits_n in closed form, (N, V) float64. Raises ValueError on non-finite logits."""

    @abstractmethod
    def hessian(self, logits: Tensor, batch: TokenBatch) -> LogitHessian:
        """d^2 loss_n / d logits_n^2 in closed form, N matrices. Raises ValueError on non-finite logits."""

    def joint_hessian(self, logits: Tensor, batch: TokenBatch) -> JointHessian:
        """d^2 (sum of the losses) / d logits^2, one matrix of NV x NV: `hessian` and what couples tokens."""
        return JointHessian(self.hessian(logits, batch), ())

    def __add__(self, other: Objective) -> Objective:
        if not isinstance(other, Objective):
            return NotImplemented
        return SumObjective(((1.0, self), (1.0, other)))

    def __mul__(self, factor: float) -> Objective:
        return SumObjective(((require_factor(factor), self),))

    __rmul__ = __mul__

    def __sub__(self, other: Objective) -> Objective:
        return self + (-1.0) * other

    def __repr__(self) -> str:
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        return f"objective({self.name!r}{options})"


class SumObjective(Objective):
    """A weighted sum of objectives; loss, gradient and Hessian are the sums of theirs."""

    def __init__(self, terms: tuple[tuple[float, Objective], ...]) -> None:
        flat: list[tuple[float, Objective]] = []
        for weight, term in terms:
            inner = term.terms if isinstance(term, SumObjective) else ((1.0, term),)
            flat += [(weight * factor, part) for factor, part in inner]
        self.terms: tuple[tuple[float, Objective], ...] = tuple(flat)
        """(weight, objective) of each term."""
        self.name = " + ".join(term.name if weight == 1 else f"{weight:g} * {term.name}" for weight, term in flat)
        self.options = {term.name: dict(term.options) for _, term in flat}

    def loss(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        return reduce(operator.add, (weight * term.loss(logits, batch) for weight, term in self.terms))

    def gradient(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        (weight, term), *rest = self.terms
        total = term.gradient(logits, batch).mul_(weight)
        for weight, term in rest:
            total.add_(term.gradient(logits, batch), alpha=weight)
        return total

    def hessian(self, logits: Tensor, batch: TokenBatch) -> LogitHessian:
        return reduce(operator.add, (weight * term.hessian(logits, batch) for weight, term in self.terms))

    def joint_hessian(self, logits: Tensor, batch: TokenBatch) -> JointHessian:
        parts = [(weight, term.joint_hessian(logits, batch)) for weight, term in self.terms]
        links = tuple(replace(link, bend=weight * link.bend) for weight, part in parts for link in part.links)
        return JointHessian(self.hessian(logits, batch), links)


def require_factor(factor: float) -> float:
    """The factor of an objective as a float; TypeError or ValueError unless it is a finite number."""
    if not isinstance(factor, (int, float)):
        raise TypeError(f"*: an objective is multiplied by a number, not by {type(factor).__name__}.")
    if not math.isfinite(factor):
        raise ValueError(f"*: {factor}; the factor of an objective must be finite.")
    return float(factor)


def working_precision(logits: Tensor) -> Tensor:
    """The logits in which a loss is computed: float64 stays, anything else becomes float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def require_logits(logits: Tensor, batch: TokenBatch) -> None:
    """Raise ValueError unless logits are (N, V) and every action is below V."""
    if logits.ndim != 2 or len(logits) != len(batch):
        raise ValueError(f"logits: shape {tuple(logits.shape)}; must be ({len(batch)}, V), one row per token.")
    if int(batch.actions.max()) >= logits.shape[1]:
        raise ValueError(f"actions: id {int(batch.actions.max())} is not below V = {logits.shape[1]}.")


def require_finite_logits(logits: Tensor, batch: TokenBatch) -> None:
    """`require_logits`, and raise ValueError naming the first token whose logits hold a NaN or an infinity."""
    require_logits(logits, batch)
    require_finite(logits)


Factory = TypeVar("Factory", bound=Callable[..., Objective])
_REGISTRY: dict[str, Callable[..., Objective]] = {}


def register(name: str) -> Callable[[Factory], Factory]:
    """Decorator: make a function that builds an objective reachable as `lg.objective(name, **options)`."""

    def add(factory: Factory) -> Factory:
        _REGISTRY[name] = factory
        return factory

    return add


def objective_names() -> list[str]:
    """The names that `objective` knows."""
    return list(_REGISTRY)


def objective(name: str, **options: object) -> Objective:
    """An objective from the registry.

    Raises:
        ValueError: unknown name, or an option out of range.
        TypeError: an option that this objective does not have.
    """
    if name not in _REGISTRY:
        near = difflib.get_close_matches(name, _REGISTRY, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"objective: no objective {name!r}.{hint} There are: {', '.join(_REGISTRY)}.")
    known = inspect.signature(_REGISTRY[name]).parameters
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"objective {name!r} has no option {unknown[0]!r}. Its options: {', '.join(known) or 'none'}.")
    return _REGISTRY[name](**options)
