"""Interventions: which tokens of a batch still count, chosen from the batch itself. Each goes with any objective.

    rule = lg.intervention("bapo")
    choice = rule(logits, batch)                  # what it would do: keep, batch, scores, bounds
    guarded = rule.on(lg.objective("reinforce"))  # an objective that does it

A clip is a mask too: where a clipped surrogate is constant, its gradient and its Hessian are 0, and so are those of a
dropped token. Only the loss's value differs, by that constant. What a loss is divided by stays the caller's: a mean
over the tokens kept and a mean over all of them are different updates.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lcogeom.geometry.hessian import LogitHessian
from lcogeom.geometry.joint import JointHessian
from lcogeom.geometry.softmax import action_logprobs
from lcogeom.objectives.base import Objective, TokenBatch, require_finite_logits
from lcogeom.objectives.last_layer import LastLayer


class Verdict(NamedTuple):
    """What a rule says of N tokens, before the batch's own mask."""

    accepted: Tensor
    """(N,) bool."""
    scores: Mapping[str, Tensor]
    """What it decided on, (N,) each."""
    bounds: tuple[Tensor, Tensor] | None = None
    """Lower and upper bound on the ratio, (N,) each; None: the rule has none."""


@dataclass(frozen=True, eq=False)
class Choice:
    """The tokens that an intervention keeps, and why."""

    keep: Tensor
    """Which tokens still count, (N,) bool; False also where the batch's mask was off."""
    batch: TokenBatch
    """The batch with `keep` as its mask."""
    scores: Mapping[str, Tensor]
    """The numbers it decided on, by name, (N,) float64 each; of masked tokens too."""
    bounds: tuple[Tensor, Tensor] | None
    """Lower and upper bound on the ratio pi / pi_old, (N,) float64 each; None: the rule has none."""


Rule = Callable[[Tensor, TokenBatch, Objective | None, LastLayer | None], Verdict]


@dataclass(frozen=True, eq=False, repr=False)
class Intervention:
    """A rule that chooses tokens from (logits, batch), never differentiated.

    One of your own: `lg.Intervention("rare", lambda logits, batch, objective, layer: lg.Verdict(keep, {}))`.
    """

    name: str
    decide: Rule
    """(logits (N, V), batch, objective or None, last layer or None) -> `Verdict`."""
    options: Mapping[str, object] = field(default_factory=dict)
    """The options it was built with, for the run's record."""

    def __call__(
        self, logits: Tensor, batch: TokenBatch, *, objective: Objective | None = None, layer: LastLayer | None = None
    ) -> Choice:
        """Choose among the tokens of a batch.

        Args:
            logits: (N, V), any floating dtype.
            batch: N tokens; which fields are needed is in each rule's docstring.
            objective: the loss whose update is judged, for the rules that ask (capo).
            layer: the last layer's input and optimiser, for the rules that ask (capo).

        Raises:
            ValueError: non-finite logits, a missing field, a layer that does not fit.
        """
        require_finite_logits(logits, batch)
        with torch.no_grad():
            verdict = self.decide(logits.detach(), batch, objective, layer)
        kept = batch.masked(verdict.accepted)
        assert kept.mask is not None
        return Choice(kept.mask, kept, verdict.scores, verdict.bounds)

    def on(self, objective: Objective, *, layer: LastLayer | None = None) -> Guarded:
        """The objective restricted to the tokens this rule keeps; chosen anew for whatever logits and batch it gets.

        layer: of the batch that the result will be called with.
        """
        return Guarded(objective, self, layer)

    def __repr__(self) -> str:
        return f"intervention({self.name!r}{''.join(f', {key}={value!r}' for key, value in self.options.items())})"


@dataclass(frozen=True, eq=False, repr=False)
class Guarded(Objective):
    """An objective on the tokens that an intervention keeps; elsewhere loss, gradient and Hessian are 0."""

    objective: Objective
    rule: Intervention
    layer: LastLayer | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        """For example `ppo+bapo`."""
        return f"{self.objective.name}+{self.rule.name}"

    @property
    def options(self) -> Mapping[str, object]:  # type: ignore[override]
        """Those of the objective, and those of the rule as `rule.option`."""
        return {**self.objective.options, **{f"{self.rule.name}.{key}": v for key, v in self.rule.options.items()}}

    def choice(self, logits: Tensor, batch: TokenBatch) -> Choice:
        """What the rule keeps of this batch."""
        return self.rule(logits, batch, objective=self.objective, layer=self.layer)

    def loss(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        return self.objective.loss(logits, self.choice(logits, batch).batch)

    def gradient(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        return self.objective.gradient(logits, self.choice(logits, batch).batch)

    def hessian(self, logits: Tensor, batch: TokenBatch) -> LogitHessian:
        return self.objective.hessian(logits, self.choice(logits, batch).batch)

    def joint_hessian(self, logits: Tensor, batch: TokenBatch) -> JointHessian:
        return self.objective.joint_hessian(logits, self.choice(logits, batch).batch)

    def __repr__(self) -> str:
        return f"{self.rule!r}.on({self.objective!r})"


def log_ratios(name: str, logits: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """(log(pi / pi_old), A) of the sampled actions, (N,) float64 each. `name`: the rule that needs them."""
    require_fields(name, batch, "advantages", "old_logprobs")
    assert batch.advantages is not None
    assert batch.old_logprobs is not None
    if batch.advantages.ndim != 1:
        raise ValueError(f"advantages: intervention {name!r} needs those of the sampled actions, (N,), not top-k ones.")
    return action_logprobs(logits, batch.actions) - batch.old_logprobs.double(), batch.advantages.double()


def require_fields(name: str, batch: TokenBatch, *needed: str) -> None:
    """Raise ValueError unless the named fields of the batch are there."""
    for needs in needed:
        if getattr(batch, needs) is None:
            raise ValueError(f"{needs}: intervention {name!r} needs it; pass TokenBatch({needs}=...).")


Factory = TypeVar("Factory", bound=Callable[..., Intervention])
_REGISTRY: dict[str, Callable[..., Intervention]] = {}


def register(name: str) -> Callable[[Factory], Factory]:
    """Decorator: make a function that builds an intervention reachable as `lg.intervention(name, **options)`."""

    def add(factory: Factory) -> Factory:
        _REGISTRY[name] = factory
        return factory

    return add


def intervention_names() -> list[str]:
    """The names that `intervention` knows."""
    return list(_REGISTRY)


def intervention(name: str, **options: object) -> Intervention:
    """An intervention from the registry.

    Raises:
        ValueError: unknown name, or an option out of range.
        TypeError: an option that this intervention does not have.
    """
    if name not in _REGISTRY:
        near = difflib.get_close_matches(name, _REGISTRY, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"intervention: no intervention {name!r}.{hint} There are: {', '.join(_REGISTRY)}.")
    known = inspect.signature(_REGISTRY[name]).parameters
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"intervention {name!r} has no option {unknown[0]!r}. Its options: {', '.join(known)}.")
    return _REGISTRY[name](**options)
