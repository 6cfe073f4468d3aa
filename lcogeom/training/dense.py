"""Dense advantages: A of several ids at every token, from a model that judges tokens.

Each function takes the logits that predict M completion tokens, (M, V), and returns (advantages (M, K),
advantage_ids (M, K)), float32 unless the logits are float64: the two fields of `TokenBatch`. As the LCO authors use
them, the other ids get no mass in LCO-KLD (`outside="drop"`), and LCO-MSE and LCO-LCH do not see them.

`normalise`, where there is one:

    std       divided by their standard deviation over the K ids of the token: the authors' LCO-KLD
    mean-std  their mean taken away before: the authors' LCO-MSE and LCO-LCH
    none      as they are

A mean taken away changes nothing in LCO-KLD where the other ids are dropped; elsewhere it decides which ids are pushed
down. Leave the objective's own `standardise` off unless `normalise` is "none".
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_DEVIATION = 1e-6
"""Below it a standard deviation counts as this much, as in `lcogeom.objectives.lco`."""


def dpo_log_ratio(
    dpo_logits: Tensor, ref_logits: Tensor, policy_logits: Tensor, *, k: int = 5, normalise: str = "std"
) -> tuple[Tensor, Tensor]:
    """A_j = log pi_dpo(j) - log pi_ref(j) on the k ids that the policy finds most likely.

    [systems.md 1.2, confirmed in code; the authors use it with LCO-KLD]

    Args:
        dpo_logits, ref_logits: of a model trained by DPO and of the one it started from, (M, V).
        policy_logits: of the rollout policy, (M, V).
        k: ids for each token; all V if there are fewer.

    Raises:
        ValueError: shapes that differ, k < 1, an unknown normalisation.
    """
    _check(k, policy_logits=policy_logits, dpo_logits=dpo_logits, ref_logits=ref_logits)
    ids = _top(policy_logits, k)
    return _normalised(_logprobs(dpo_logits, ids) - _logprobs(ref_logits, ids), normalise), ids


def q_rm(
    verifier_logits: Tensor,
    policy_logits: Tensor | None = None,
    *,
    k: int = 5,
    version: str = "v1",
    normalise: str = "std",
) -> tuple[Tensor, Tensor]:
    """A_j = log-softmax of the verifier's logits, on the top k ids of the policy ("v1") or of the verifier ("v2").

    The verifier is trained by `preferences.q_rm_loss`; the log-softmax of its logits is Q* - V* (systems.md 14).
    [systems.md 1.2, confirmed in code]

    Args:
        verifier_logits: (M, V).
        policy_logits: of the rollout policy, (M, V); "v2" needs none.
        k: ids for each token; all V if there are fewer.

    Raises:
        ValueError: shapes that differ, k < 1, an unknown version or normalisation, "v1" without policy_logits.
    """
    if version not in ("v1", "v2"):
        raise ValueError(f"version: {version!r}; must be v1 (the policy's top k) or v2 (the verifier's).")
    if version == "v1" and policy_logits is None:
        raise ValueError('policy_logits: version "v1" needs them, for their top k ids.')
    ranking = verifier_logits if version == "v2" or policy_logits is None else policy_logits
    _check(k, verifier_logits=verifier_logits, policy_logits=ranking)
    ids = _top(ranking, k)
    return _normalised(_logprobs(verifier_logits, ids), normalise), ids


def adpa(
    dpo_logits: Tensor, ref_logits: Tensor, *, k: int = 50, least_probability: float = 1e-7
) -> tuple[Tensor, Tensor]:
    """A_j = log(max(p_dpo, 1e-7) / max(p_ref, 1e-7)) on the DPO teacher's k most likely ids.

    The objective `adpa` gives the other ids the least of them. [systems.md 15, confirmed in code]

    Args:
        dpo_logits, ref_logits: of the teacher and of the model it started from, (M, V).
        k: ids for each token; all V if there are fewer.

    Raises:
        ValueError: shapes that differ, k < 1.
    """
    _check(k, dpo_logits=dpo_logits, ref_logits=ref_logits)
    ids = _top(dpo_logits, k)
    floor = torch.tensor(least_probability, dtype=torch.float64).log().item()
    return _logprobs(dpo_logits, ids).clamp(min=floor) - _logprobs(ref_logits, ids).clamp(min=floor), ids


def agreement(old_logprobs: Tensor, verifier_logprobs: Tensor, *, threshold: float = -0.02) -> Tensor:
    """Where the rollout policy and the verifier are both nearly certain of the sampled token, (M,) bool.

    [systems.md 1.2, confirmed in code]

    Args:
        old_logprobs, verifier_logprobs: log-probability of the sampled token under either, (M,).
        threshold: what both must exceed; -0.02 is a probability of 0.980.
    """
    return (old_logprobs > threshold) & (verifier_logprobs > threshold)


def damped(advantages: Tensor, agreed: Tensor, *, factor: float = 100.0) -> Tensor:
    """The advantages, (M, K) or (M,), divided by `factor` where `agreed`, (M,) bool.

    The authors multiply beta by 100 at tokens of `agreement`. The LCO losses see A / beta alone, so this is the same
    thing, provided that the objective does not standardise the advantages again. [systems.md 1.2, confirmed in code]
    """
    scale = torch.where(agreed, 1 / factor, 1.0).to(advantages.dtype)
    return advantages * (scale if advantages.ndim == 1 else scale[:, None])


def q_values(verifier_logits: Tensor, actions: Tensor, *, raw: bool = True, normalise: str = "std") -> Tensor:
    """The verifier's value of each sampled token, (M,): the per-token reward of Q-RM's own PPO and REINFORCE.

    Use them as rewards of `advantages.gae`, or with `advantages.q_advantages` (the authors' `reward_is_q`).
    [systems.md 14, confirmed in code; that the deviation is taken over the M tokens of the batch is reconstructed]

    Args:
        verifier_logits: (M, V).
        actions: sampled ids, (M,).
        raw: the action's logit (Q-RM); otherwise its log-probability (the LCO authors' variant).
        normalise: "std", "mean-std" or "none", over the M tokens.

    Raises:
        ValueError: an unknown normalisation.
    """
    ids = actions.long()[:, None]
    values = _working(verifier_logits).gather(1, ids) if raw else _logprobs(verifier_logits, ids)
    return _normalised(values.T, normalise)[0]


def _normalised(advantages: Tensor, normalise: str) -> Tensor:
    """(M, K), normalised over K."""
    if normalise not in ("std", "mean-std", "none"):
        raise ValueError(f"normalise: {normalise!r}; must be std, mean-std or none.")
    if normalise == "none":
        return advantages
    deviation = advantages.std(dim=1, keepdim=True) if advantages.shape[1] > 1 else torch.ones_like(advantages)
    if normalise == "mean-std":
        advantages = advantages - advantages.mean(dim=1, keepdim=True)
    return advantages / deviation.clamp(min=LEAST_DEVIATION)


def _working(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """log p at the ids, (M, K)."""
    z = _working(logits)
    return z.gather(1, ids) - z.logsumexp(dim=1, keepdim=True)  # no (M, V) of log-probabilities


def _top(logits: Tensor, k: int) -> Tensor:
    return logits.topk(min(k, logits.shape[1]), dim=1).indices


def _check(k: int, **logits: Tensor) -> None:
    if k < 1:
        raise ValueError(f"k: {k}; must be at least 1.")
    first, *rest = logits.items()
    if first[1].ndim != 2:
        raise ValueError(f"{first[0]}: shape {tuple(first[1].shape)}; must be (M, V).")
    for name, tensor in rest:
        if tensor.shape != first[1].shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}; must be {tuple(first[1].shape)}, as {first[0]}.")
