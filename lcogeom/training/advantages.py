"""From rewards to advantages: one number per completion, or one per token from a critic.

Pure functions of tensors, on any device; once a rollout. Half-precision input is computed in float32, float64 stays.
Where a source is named, it is a section of systems.md or the paper; what is reconstructed says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Groups:
    """Which of B completions answer the same prompt, numbered 0, 1, ..."""

    index: Tensor
    """(B,) int64 in [0, G)."""
    count: int
    """G."""

    def total(self, values: Tensor) -> Tensor:
        """Sum of `values`, (B,), in each group, (G,)."""
        return values.new_zeros(self.count).index_add(0, self.index, values)

    def sizes(self, values: Tensor) -> Tensor:
        """Completions in each group, (G,), in the dtype of `values`."""
        return self.total(torch.ones_like(values))

    def extreme(self, values: Tensor, how: str) -> Tensor:
        """The least ("amin") or greatest ("amax") of `values`, (B,), in each group, (G,)."""
        return values.new_zeros(self.count).scatter_reduce(0, self.index, values, how, include_self=False)

    def centred(self, values: Tensor) -> Tensor:
        """`values` minus the mean of their group, (B,); exactly 0 where all of a group are equal, however large."""
        above = values - self.extreme(values, "amin")[self.index]
        return above - (self.total(above) / self.sizes(values))[self.index]


def group_relative(
    rewards: Tensor, groups: Tensor, *, scale: str = "std", eps: float = 1e-4, clip: float | None = None
) -> Tensor:
    """(r - mean of the group) / (std of the group + eps): GRPO, DAPO. With scale="none" r - mean: Dr. GRPO.

    The standard deviation has n - 1 below, as in TRL and the LCO authors' code. A group of one, or of equal rewards,
    gets 0. [systems.md 3.3, 3.7, confirmed]

    Args:
        rewards: (B,).
        groups: (B,) integer, equal for completions of the same prompt, in any order.
        scale: "std" or "none".
        eps: added to the standard deviation.
        clip: bound on the size of an advantage; None: none.

    Returns:
        (B,).

    Raises:
        ValueError: shapes that differ, a reward that is not finite, an unknown scale.
    """
    if scale not in ("std", "none"):
        raise ValueError(f"scale: {scale!r}; must be std (GRPO) or none (Dr. GRPO).")
    values, grouped, dtype = _checked(rewards, groups)
    centred = grouped.centred(values)
    if scale == "std":
        freedom = (grouped.sizes(values) - 1).clamp(min=1)
        spread = (grouped.total(centred.square()) / freedom).sqrt()
        centred = centred / (spread[grouped.index] + eps)
    if clip is not None:
        centred = centred.clamp(-clip, clip)
    return centred.to(dtype)


def leave_one_out(rewards: Tensor, groups: Tensor) -> Tensor:
    """r_i minus the mean of the OTHER rewards of its group: RLOO. A group of one gets 0: it has no baseline.

    Arguments, result and errors: as `group_relative`. [systems.md 3.7, confirmed]
    """
    values, grouped, dtype = _checked(rewards, groups)
    sizes = grouped.sizes(values)
    return (grouped.centred(values) * (sizes / (sizes - 1).clamp(min=1))[grouped.index]).to(dtype)


def reinforce_baseline(rewards: Tensor, *, baseline: str = "mean") -> Tensor:
    """REINFORCE's advantages: r minus the mean over the whole batch, or (baseline="none") r itself.

    Args:
        rewards: (B,).

    Raises:
        ValueError: an unknown baseline, a reward that is not finite.
    """
    if baseline not in ("none", "mean"):
        raise ValueError(f"baseline: {baseline!r}; must be none or mean.")
    values, grouped, dtype = _checked(rewards, torch.zeros_like(rewards, dtype=torch.long))
    return (values if baseline == "none" else grouped.centred(values)).to(dtype)


def rule_reward(rewards: Tensor, *, threshold: float = 0.5) -> Tensor:
    """+1 for a right answer, -1 for a wrong one: the advantages of LCO in the sparse setting. (B,) -> (B,).

    A reward above `threshold` is right; 0.5 serves rewards of 0 and 1 and of -1 and 1. The authors pair it with
    `negative_beta_scale=100`. [systems.md 1.2, confirmed]

    Raises:
        ValueError: a reward that is not finite.
    """
    values, _, dtype = _checked(rewards, torch.zeros_like(rewards, dtype=torch.long))
    return torch.where(values > threshold, 1.0, -1.0).to(dtype)


def informative_groups(rewards: Tensor, groups: Tensor) -> Tensor:
    """Which completions belong to a group whose rewards differ, (B,) bool: DAPO's dynamic sampling keeps those.

    Arguments and errors: as `group_relative`. [systems.md 3.4, confirmed]
    """
    values, grouped, _ = _checked(rewards, groups)
    return (grouped.extreme(values, "amax") > grouped.extreme(values, "amin"))[grouped.index]


def overlong_penalty(lengths: Tensor, *, longest: int, buffer: int) -> Tensor:
    """DAPO's soft punishment of length, to be added to the reward: 0, then linearly down to -1 over the last `buffer`.

        0                                    n <= longest - buffer
        (longest - buffer - n) / buffer      up to n = longest
        -1                                   beyond

    [DAPO, arXiv 2503.14476, soft overlong punishment; there longest = 20,480 and buffer = 4,096]

    Args:
        lengths: n, completion tokens, (B,).
        longest: the length at which the penalty is -1.
        buffer: over how many tokens it grows.

    Returns:
        (B,) float32 in [-1, 0].

    Raises:
        ValueError: buffer < 1 or above longest.
    """
    if not 1 <= buffer <= longest:
        raise ValueError(f"buffer: {buffer}; must be from 1 to longest = {longest}.")
    return ((longest - buffer - lengths.float()) / buffer).clamp(-1.0, 0.0)


def adora_weights(
    rewards: Tensor,
    groups: Tensor,
    lengths: Tensor,
    *,
    correct: float,
    longest: int,
    damped: float = 0.1,
    version: str = "llm",
) -> Tensor:
    """ADORA's factor on a group's advantages, (B,): 1 where its longest right answer outlasts the average wrong one.

    A group weighs 1 if the longest right completion is longer than the mean of the wrong ones that were not cut off,
    else `damped`; a group without a right answer `damped` in the language version and 1 in the vision-language version.
    [systems.md 7, confirmed in code; that a group whose wrong answers were all cut off weighs 1 is reconstructed]

    Args:
        rewards, groups: (B,).
        lengths: completion tokens, (B,).
        correct: a completion is right from this reward on (1.01 on the authors' scale of rewards).
        longest: a completion of this length was cut off.
        damped: the small weight.
        version: "llm" or "vl".

    Raises:
        ValueError: as `group_relative`; an unknown version.
    """
    if version not in ("llm", "vl"):
        raise ValueError(f"version: {version!r}; must be llm or vl.")
    values, grouped, dtype = _checked(rewards, groups)
    _same_shape("lengths", lengths, rewards)
    length = lengths.to(values)
    right = values >= correct
    complete = ~right & (length < longest)
    longest_right = grouped.extreme(torch.where(right, length, -torch.inf), "amax")
    wrong = grouped.total(complete.to(values))
    mean_wrong = grouped.total(torch.where(complete, length, 0.0)) / wrong.clamp(min=1)
    solved = torch.isfinite(longest_right)
    full = solved & ((longest_right > mean_wrong) | (wrong == 0))
    if version == "vl":
        full = full | ~solved
    return torch.where(full, 1.0, damped)[grouped.index].to(dtype)


def adora(
    rewards: Tensor, groups: Tensor, lengths: Tensor, *, correct: float, longest: int, version: str = "llm"
) -> Tensor:
    """ADORA's advantages, (B,): group-relative with 1e-6 below, times `adora_weights`. [systems.md 7, confirmed]"""
    weights = adora_weights(rewards, groups, lengths, correct=correct, longest=longest, version=version)
    return group_relative(rewards, groups, eps=1e-6) * weights


SEQUENCE_ADVANTAGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "group": group_relative,
    "dr-grpo": lambda rewards, groups: group_relative(rewards, groups, scale="none"),
    "rloo": leave_one_out,
    "reinforce": lambda rewards, _: reinforce_baseline(rewards, baseline="none"),
    "reinforce-mean": lambda rewards, _: reinforce_baseline(rewards),
    "rule": lambda rewards, _: rule_reward(rewards),
}


def sequence_advantages(
    name: str,
    rewards: Tensor,
    groups: Tensor,
    *,
    lengths: Tensor | None = None,
    longest: int | None = None,
    correct: float = 1.0,
) -> Tensor:
    """One advantage per completion by name: group, dr-grpo, rloo, reinforce, reinforce-mean, rule, adora. (B,).

    lengths, longest and correct: of `adora` alone, which needs the first two.

    Raises:
        ValueError: an unknown name; `adora` without lengths or longest; as the functions themselves.
    """
    if name == "adora":
        if lengths is None or longest is None:
            raise ValueError("advantages: 'adora' needs lengths=... and longest=...")
        return adora(rewards, groups, lengths, correct=correct, longest=longest)
    if name not in SEQUENCE_ADVANTAGES:
        raise ValueError(f"advantages: no {name!r}. There are: {', '.join((*SEQUENCE_ADVANTAGES, 'adora'))}.")
    return SEQUENCE_ADVANTAGES[name](rewards, groups)


def gae(rewards: Tensor, values: Tensor, action_mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the action tokens of each row; other tokens are skipped, wherever they are.

        delta_t = r_t + gamma V_(t+1) - V_t,      A_t = sum_k (gamma lam)^k delta_(t+k)

    with t + 1 the next ACTION token of the row and V = 0 after the last. [arXiv 1506.02438; the LCO authors' PPO uses
    gamma 0.9, lambda 0.8 (systems.md 3.7)]

    Args:
        rewards: (B, T), of each action token.
        values: (B, T), the critic's V before each action token.
        action_mask: (B, T) bool.
        gamma, lam: in [0, 1].

    Returns:
        (advantages, returns = advantages + values), (B, T) each, 0 off the mask.

    Raises:
        ValueError: shapes that differ, gamma or lam outside [0, 1].
    """
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0 <= number <= 1:
            raise ValueError(f"{name}: {number}; must be in [0, 1].")
    _same_shape("values", values, rewards)
    _same_shape("action_mask", action_mask, rewards)
    dtype = torch.promote_types(torch.promote_types(rewards.dtype, values.dtype), torch.float32)
    order = (~action_mask).long().argsort(dim=1, stable=True)  # a row's action tokens side by side, in their order
    kept = action_mask.gather(1, order)
    reward = torch.where(kept, rewards.gather(1, order).to(dtype), 0.0)
    value = torch.where(kept, values.gather(1, order).to(dtype), 0.0)
    sums = reward + gamma * _ahead(value, 1) - value
    reach, decay = 1, gamma * lam
    while reach < sums.shape[1]:  # sums over k < reach, doubled each time: log2(T) steps instead of T
        sums = sums + decay**reach * _ahead(sums, reach)
        reach *= 2
    advantages = torch.zeros_like(sums).scatter(1, order, torch.where(kept, sums, 0.0))
    return advantages, torch.where(action_mask, advantages + values.to(dtype), 0.0)


def q_advantages(
    q: Tensor, values: Tensor, action_mask: Tensor, *, value_weight: float = 0.01
) -> tuple[Tensor, Tensor]:
    """What Q-RM's PPO does with `reward_is_q`: A = Q - value_weight V, and the critic's target is Q itself.

    [systems.md 14, confirmed in code]

    Args:
        q: per-token values of the reward model, (B, T).
        values: the critic's, (B, T).
        action_mask: (B, T) bool.

    Returns:
        (advantages, returns), (B, T) each, 0 off the mask.

    Raises:
        ValueError: shapes that differ.
    """
    _same_shape("values", values, q)
    _same_shape("action_mask", action_mask, q)
    dtype = torch.promote_types(torch.promote_types(q.dtype, values.dtype), torch.float32)
    returns = torch.where(action_mask, q.to(dtype), 0.0)
    return torch.where(action_mask, returns - value_weight * values.to(dtype), 0.0), returns


def whiten(advantages: Tensor, action_mask: Tensor, *, centre: bool = True, eps: float = 1e-8) -> Tensor:
    """Advantages divided by their standard deviation over the action tokens of the batch, (B, T), 0 off the mask.

    What PPO implementations do after GAE. n - 1 below; variance + eps under the root, as TRL's PPO had it.

    Args:
        advantages: (B, T).
        action_mask: (B, T) bool.
        centre: whether their mean is taken away.

    Raises:
        ValueError: shapes that differ.
    """
    _same_shape("action_mask", action_mask, advantages)
    values = torch.where(action_mask, advantages.to(torch.promote_types(advantages.dtype, torch.float32)), 0.0)
    count = action_mask.sum()
    mean = values.sum() / count.clamp(min=1)
    apart = torch.where(action_mask, values - mean, 0.0)
    deviation = (apart.square().sum() / (count - 1).clamp(min=1) + eps).sqrt()
    return (apart if centre else values) / deviation


def _ahead(values: Tensor, steps: int) -> Tensor:
    """`values`, (B, T), of `steps` places later; 0 beyond the end."""
    return torch.nn.functional.pad(values[:, steps:], (0, min(steps, values.shape[1])))


def _checked(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Groups, torch.dtype]:
    """(rewards in float64, their groups, the dtype of the result)."""
    if rewards.ndim != 1 or not len(rewards):
        raise ValueError(f"rewards: shape {tuple(rewards.shape)}; must be (B,), one for each completion.")
    _same_shape("groups", groups, rewards)
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError(f"rewards: NaN or infinite at completion {int((~torch.isfinite(rewards)).nonzero()[0])}.")
    found, index = torch.unique(groups, return_inverse=True)
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    return rewards.double(), Groups(index, len(found)), dtype


def _same_shape(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.shape != like.shape:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}; must be {tuple(like.shape)}, as the rewards.")
