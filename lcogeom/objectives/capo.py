"""CAPO: drop the tokens whose own update the second-order model of the last layer does not trust (systems.md, 2).

What it judges by, m_H and m_F at three levels, is in last_layer_curvature.py; without an objective it takes the paper's
L = -A r at r = 1.

A token counts where m_H and m_F pass:

    rule="symmetric"    |m_H| < tau_h                                (code)
    rule="one-sided"    m_H >= tau_h, and m_H < tau_h_high if given  (theorem 5.1; with both, the paper's interval, and
                        with tau_h=0 the code's mode without symmetric clipping)
    both                m_F < tau_f

Here 0 or None switches a test off, as in the code; in the one-sided rule tau_h = 0 is a bound like any other. A number
that is not finite never passes. Theorem 5.1 asks for a LOWER bound on m_H; the published runs used the symmetric rule.

Options, the same for the presets (published defaults, token level):

                   for           tau_h   tau_f
    capo           GRPO          0.01    1e-4
    dr-capo        Dr.GRPO       5e-4    1e-3
    rein-capo      REINFORCE     0.1     1e-5

    level        one of token, sentence, global, or several of them, applied in this order
    tau_h, tau_f a number, or one per level: {"token": 0.01, "global": 0.1}
    fisher       "empirical" (code) or "exact"
    top_k        p renormalised on the k likeliest ids and the action (the code: on the 50 it samples from), and rows of
                 W averaged over the tokens that have them among their k, as in the code. None: all V
    sequential   judge each level on what the one before has left. The published code computes those values, for its
                 log, and decides on the first ones, which is sequential=False

[systems.md 2.4: confirmed in the code]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lcogeom.objectives.action import ActionObjective
from lcogeom.objectives.base import Objective, TokenBatch
from lcogeom.objectives.interventions import Intervention, Verdict, register, require_fields
from lcogeom.objectives.last_layer import LastLayer
from lcogeom.objectives.last_layer_curvature import LEVELS, measure

PUBLISHED = {"capo": (0.01, 1e-4), "dr-capo": (5e-4, 1e-3), "rein-capo": (0.1, 1e-5)}  # name -> tau_h, tau_f
Threshold = float | Mapping[str, float] | None


def _paper(logp: Tensor, batch: TokenBatch) -> Tensor:
    """-A r at r = 1, wherever the policy stands: its gradient is -A v, its Hessian -A (v v^T - S)."""
    assert batch.advantages is not None
    return -batch.advantages.to(logp) * (logp - logp.detach()).exp()


PAPER = ActionObjective("surrogate", _paper, ("advantages",))


@dataclass(frozen=True)
class CapoOptions:
    """See the head of this file."""

    level: tuple[str, ...]
    rule: str
    tau_h: Threshold
    tau_h_high: Threshold
    tau_f: Threshold
    fisher: str
    top_k: int | None
    sequential: bool

    def __post_init__(self) -> None:
        if not self.level or not set(self.level) <= set(LEVELS):
            raise ValueError(f"level: {self.level!r}; must be one or several of {', '.join(LEVELS)}.")
        for option, allowed in (("rule", ("symmetric", "one-sided")), ("fisher", ("empirical", "exact"))):
            if getattr(self, option) not in allowed:
                raise ValueError(f"{option}: {getattr(self, option)!r}; must be one of {', '.join(allowed)}.")
        for option in ("tau_h", "tau_h_high", "tau_f"):
            for level in self.level:
                bound = self.threshold(option, level)
                if bound is not None and not (bound >= 0 and math.isfinite(bound)):
                    raise ValueError(f"{option}: {bound}; must be a finite number >= 0, or None for no bound.")
        if self.tau_h_high is not None and self.rule == "symmetric":
            raise ValueError('tau_h_high: the symmetric rule has one bound, tau_h; pass rule="one-sided" for two.')
        if self.top_k is not None and self.top_k < 2:
            raise ValueError(f"top_k: {self.top_k}; must be an integer >= 2, or None for the whole vocabulary.")

    def threshold(self, option: str, level: str) -> float | None:
        """One of the thresholds at one level; None: no bound."""
        value: Threshold = getattr(self, option)
        if isinstance(value, Mapping):
            if not set(value) <= set(self.level):
                raise ValueError(f"{option}: levels {', '.join(value)}; this rule judges {', '.join(self.level)}.")
            return value.get(level)
        return value

    def accepts(self, level: str, rise: Tensor, divergence: Tensor) -> Tensor:
        """Whether m_H and m_F pass, (N,) bool."""
        low, high, most = (self.threshold(option, level) for option in ("tau_h", "tau_h_high", "tau_f"))
        accepted = torch.ones_like(rise, dtype=torch.bool)
        if self.rule == "symmetric":
            if low:
                accepted &= rise.abs() < low
        else:
            if low is not None:
                accepted &= rise >= low
            if high:
                accepted &= rise < high
        return accepted & (divergence < most) if most else accepted

    def decide(
        self, logits: Tensor, batch: TokenBatch, objective: Objective | None, layer: LastLayer | None
    ) -> Verdict:
        """The rule itself; called by `Intervention`."""
        if layer is None:
            raise ValueError(
                "layer: intervention 'capo' judges a step of the last layer; "
                "pass layer=lg.LastLayer(hidden, learning_rate=...)."
            )
        layer.require(*logits.shape)
        if "sentence" in self.level:
            require_fields("capo", batch, "sequences")
        ids = None
        if self.top_k is not None and self.top_k < logits.shape[1]:
            logits, batch, ids = _top_k(logits, batch, self.top_k)
        accepted = torch.ones(len(batch), dtype=torch.bool, device=logits.device)
        scores: dict[str, Tensor] = {}
        for level in self.level:
            measured = measure(level, logits, batch, objective or PAPER, layer=layer, ids=ids)
            measured["m_F"] = measured[f"m_F_{self.fisher}"]
            prefix = "" if len(self.level) == 1 else f"{level}."
            scores |= {prefix + key: value for key, value in measured.items()}
            accepted &= self.accepts(level, measured["m_H"], measured["m_F"])
            if self.sequential:
                batch = batch.masked(accepted)
        return Verdict(accepted, scores)


def _top_k(logits: Tensor, batch: TokenBatch, k: int) -> tuple[Tensor, TokenBatch, Tensor]:
    """(logits (N, k), the batch in terms of those columns, their token ids (N, k)); the action is always among them."""
    if batch.advantage_ids is not None:
        raise ValueError("top_k: advantages of several ids per token (advantage_ids) cannot be cut; pass top_k=None.")
    ids = logits.topk(k, dim=1).indices
    missing = (ids != batch.actions[:, None]).all(1)
    ids[:, -1] = torch.where(missing, batch.actions.long(), ids[:, -1])
    present = {name: getattr(batch, name) for name in ("old_logits", "ref_logits") if getattr(batch, name) is not None}
    cut = {name: value.gather(1, ids) for name, value in present.items()}
    column = (ids == batch.actions[:, None]).long().argmax(1)
    return logits.gather(1, ids), replace(batch, actions=column, **cut), ids


def _preset(name: str, published_h: float, published_f: float) -> Callable[..., Intervention]:
    """The factory of one published variant."""

    def build(
        *,
        level: str | Sequence[str] = "token",
        rule: str = "symmetric",
        tau_h: Threshold = published_h,
        tau_h_high: Threshold = None,
        tau_f: Threshold = published_f,
        fisher: str = "empirical",
        top_k: int | None = None,
        sequential: bool = False,
    ) -> Intervention:
        asked = (level,) if isinstance(level, str) else tuple(level)
        ordered = tuple(one for one in LEVELS if one in asked) + tuple(one for one in asked if one not in LEVELS)
        options = CapoOptions(ordered, rule, tau_h, tau_h_high, tau_f, fisher, top_k, sequential)
        return Intervention(name, options.decide, vars(options))

    return build


for _name, (_tau_h, _tau_f) in PUBLISHED.items():
    register(_name)(_preset(_name, _tau_h, _tau_f))
