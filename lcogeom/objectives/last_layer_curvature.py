"""m_H and m_F: what one step of the last layer does to a loss and to the policy, to second order (systems.md, 2).

The model (arXiv 2510.00819, eqs 7-10): only the head W moves, by D, so the logits of a token move by u = D h. Then

    m_H = -dL/dz . u - 1/2 u^T H u       predicted rise of the objective -L
    m_F = 1/2 (v . u)^2                  predicted KL, v = e_a - p: the paper's, from the one sampled action
          1/2 u^T S u                    the same, exact: what (v . u)^2 estimates where u does not depend on a

for any loss L with logit gradient dL/dz and Hessian H. Of a loss that couples tokens, H holds what couples the tokens
that move together. For L = -A r at r = 1, m_H and the empirical m_F are the paper's. Along a token's own gradient u
does depend on a, and the empirical form is off by ||v||^4 / (v^T S v): above 100 on flat distributions of 1000 ids,
below 0.1 near p_a = 1.

D is the step U(G) of the optimiser for the gradient G = dL/dz h^T of W:

    token       G of the token itself
    sentence    mean over the tokens of a completion (`TokenBatch.sequences`); m_H, m_F are means over them too
    global      mean over the batch. The published code averages the terms after the first over completions first,
                which is the same where they are equally long

With tied embeddings G lacks what reaches W through the input: D is then not the step that W really makes.

[systems.md 2.3: confirmed in the code; the general form for any L, and the exact m_F, are derived here]
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lcogeom.geometry.joint import Link
from lcogeom.geometry.softmax import distributions
from lcogeom.objectives.autograd import AutogradObjective
from lcogeom.objectives.base import Objective, TokenBatch, require_finite_logits
from lcogeom.objectives.last_layer import LastLayer, move_alone, move_together

LEVELS = ("token", "sentence", "global")


@dataclass(frozen=True, eq=False)
class CurvatureTerms:
    """Second-order predictions along one kind of step, float64."""

    m_H: Tensor
    """Rise of -L, in the loss's own unit."""
    m_F_empirical: Tensor
    """KL in nats from the sampled action alone, 1/2 (v . u)^2: CAPO's."""
    m_F_exact: Tensor
    """KL in nats from the whole distribution, 1/2 u^T S u."""


@dataclass(frozen=True, eq=False)
class LastLayerCurvature:
    """m_H and m_F of a batch; None at a level that was not asked for. A masked token's are 0."""

    token: CurvatureTerms | None
    """(N,) each: every token along the step of its OWN gradient, CAPO's token level."""
    sentence_ids: Tensor | None
    """The completions in ascending order, (S,)."""
    sentence: CurvatureTerms | None
    """(S,) each: means over the kept tokens of a completion, along the step of their mean gradient."""
    update: CurvatureTerms | None
    """Numbers: means over the kept tokens, along the step of their mean gradient; CAPO's global level. Where the loss
    is the mean over tokens, the head's step is this one, and m_H and m_F_exact predict the update's."""
    token_in_update: CurvatureTerms | None
    """(N,) each: every token along that same step of the whole update; `update` holds their means."""


def last_layer_curvature(
    objective: Objective | AutogradObjective,
    logits: Tensor,
    batch: TokenBatch,
    *,
    layer: LastLayer,
    levels: Collection[str] = LEVELS,
) -> LastLayerCurvature:
    """m_H and both m_F of an objective's next update, predicted from what is known before it (systems.md, 2.3).

    Holds one N x V float64 tensor at a time. With Adam the token level costs O(N V d): every token has a step of the
    whole head. The others are two products of N x V by V x d or N x N.

    Args:
        objective: the loss whose mean over tokens is minimised.
        logits: (N, V), any floating dtype, before the update.
        batch: the N tokens, with `sequences` for the level "sentence".
        layer: the head's input, the learning rate and, for Adam, its moments: `lg.LastLayer`.
        levels: some of "token", "sentence" and "global" (the whole update).

    Raises:
        ValueError: non-finite logits, an unknown level, sequences missing, a layer that does not fit.
    """
    unknown = sorted(set(levels) - set(LEVELS))
    if isinstance(levels, str) or unknown or not levels:
        raise ValueError(f"levels: {levels!r}; must be a list of some of {', '.join(LEVELS)}.")
    if "sentence" in levels and batch.sequences is None:
        raise ValueError("sequences: the level 'sentence' needs them; pass TokenBatch(sequences=...) or other levels.")
    require_finite_logits(logits, batch)
    layer.require(*logits.shape)
    logits = logits.detach()
    token = ids = sentence = update = inside = None
    with torch.no_grad():
        live = batch.kept(torch.ones(len(batch), dtype=torch.float64, device=logits.device))
        if "token" in levels:
            token = CurvatureTerms(**terms("token", logits, batch, objective, layer=layer))
        if "sentence" in levels:
            assert batch.sequences is not None
            ids, place = batch.sequences.unique(return_inverse=True)
            zero = live.new_zeros(len(ids))
            count = zero.index_add(0, place, live).clamp(min=1)
            found = terms("sentence", logits, batch, objective, layer=layer)
            sentence = CurvatureTerms(**{key: zero.index_add(0, place, one) / count for key, one in found.items()})
        if "global" in levels:
            found = terms("global", logits, batch, objective, layer=layer)
            inside = CurvatureTerms(**found)
            update = CurvatureTerms(**{key: one.sum() / live.sum().clamp(min=1) for key, one in found.items()})
    return LastLayerCurvature(token, ids, sentence, update, inside)


def measure(
    level: str, logits: Tensor, batch: TokenBatch, objective: Objective, *, layer: LastLayer, ids: Tensor | None
) -> dict[str, Tensor]:
    """`terms`, averaged over the kept tokens of a completion or the batch, at each of its tokens."""
    live = batch.kept(torch.ones(len(batch), dtype=torch.float64, device=logits.device))
    measured = terms(level, logits, batch, objective, layer=layer, ids=ids)
    for value in measured.values():
        for group in _groups(level, batch):
            value[group] = value[group].sum() / live[group].sum().clamp(min=1)
    return measured


def terms(
    level: str,
    logits: Tensor,
    batch: TokenBatch,
    objective: Objective | AutogradObjective,
    *,
    layer: LastLayer,
    ids: Tensor | None = None,
) -> dict[str, Tensor]:
    """Each token's m_H, m_F_empirical and m_F_exact along the step of its level, (N,) float64; 0 of masked tokens.

    Args:
        logits: (N, K), those of `ids` (N, K), or of the whole vocabulary where ids is None.
    """
    live = batch.kept(torch.ones(len(batch), dtype=torch.float64, device=logits.device))
    # The one tensor of N x V, overwritten by the displacement: at V = 49,152, 192 MiB for 512 tokens.
    moved = objective.gradient(logits, batch).double()
    if level == "token":
        change = move_alone(layer, moved, ids)
    else:
        change = torch.zeros_like(live)
        for group in _groups(level, batch):
            change[group] = move_together(layer, moved, ids, group, live)
    rise = -change - _bend(level, logits, batch, objective, moved) / 2
    empirical, exact = _divergence(logits, batch.actions, moved)
    return {"m_H": batch.kept(rise), "m_F_empirical": batch.kept(empirical), "m_F_exact": batch.kept(exact)}


def _bend(
    level: str, logits: Tensor, batch: TokenBatch, objective: Objective | AutogradObjective, moved: Tensor
) -> Tensor:
    """u^T H u of each token, (N,), with its share of what couples it to the tokens that move with it."""
    if level == "token" or isinstance(objective, AutogradObjective):
        return objective.hessian(logits, batch).quadratic(moved)
    joint = objective.joint_hessian(logits, batch)
    if not joint.links:
        return joint.blocks.quadratic(moved)
    if level == "sentence":
        assert batch.sequences is not None
        _, place = batch.sequences.unique(return_inverse=True)
        joint = replace(joint, links=tuple(_within(link, place) for link in joint.links))
    return (moved * (joint @ moved)).sum(1)


def _within(link: Link, place: Tensor) -> Link:
    """The link cut between completions; place: which completion each token belongs to, (N,) in [0, S)."""
    both, groups = torch.stack([link.groups, place]).unique(dim=1, return_inverse=True)
    return replace(link, groups=groups, bend=link.bend[both[0]])


def _divergence(logits: Tensor, actions: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
    """(1/2 (v . u)^2, 1/2 u^T S u), (N,) each, for u = moved (N, K)."""
    empirical, exact = moved.new_empty(2, len(moved))
    for rows, some in distributions(logits, actions):
        u = moved[rows]
        u = u - u.gather(1, some.probs.argmax(1, keepdim=True))  # a constant changes neither, but may cancel badly
        u -= (some.probs * u).sum(1, keepdim=True)
        empirical[rows] = u.gather(1, some.actions[:, None]).squeeze(1).square() / 2
        exact[rows] = (some.probs * u.square()).sum(1) / 2
    return empirical, exact


def _groups(level: str, batch: TokenBatch) -> Iterator[slice | Tensor]:
    """The tokens of each completion, or of the batch; slices where they lie together. Of single tokens none."""
    if level == "token":
        return
    if level == "global":
        yield slice(0, len(batch))
        return
    assert batch.sequences is not None
    order = batch.sequences.argsort(stable=True)
    _, counts = batch.sequences[order].unique_consecutive(return_counts=True)
    for group in order.split(counts.tolist()):
        first, last = int(group[0]), int(group[-1])
        yield slice(first, last + 1) if last - first + 1 == len(group) else group
