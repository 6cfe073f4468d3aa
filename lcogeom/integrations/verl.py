"""LCO in verl: a policy loss of the sampled tokens' log-probabilities, which is all that verl hands to a policy loss.

    # my_losses.py, named in verl's configuration as actor_rollout_ref.model.external_lib
    from lcogeom.integrations.verl import register
    register(beta=2.0, negative_beta_scale=100.0)      # then actor_rollout_ref.actor.policy_loss.loss_mode=lco-kld

What log-probabilities allow, with p = pi(a), q = pi_old(a), v = e_a - pi and y = softmax(log pi_old + A e_a / beta):

- **LCO-KLD, sparse advantages.** Its gradient on the first update on a rollout, where pi = pi_old, is `-alpha v` with
  alpha = q (e^(A/beta) - 1) / (1 + q (e^(A/beta) - 1)) (method.md, 2.3), a function of q alone: exact. Afterwards the
  whole distribution matters: pi - y also has (1 - alpha) (pi - pi_old) in it. The loss here is the KL divergence of the
  two outcomes "a" and "another token", y_a log(y_a / p) + (1 - y_a) log((1 - y_a) / (1 - p)). It is exact as long as
  the other tokens keep their proportions among themselves, a lower bound of LCO-KLD always, and has its finite target,
  p = y_a. What is lost is the pull of the other tokens back to their old proportions. It is convex in the logits
  where p <= y_a; LCO-KLD is everywhere.
- **LCO-MSE and LCO-LCH: not at all.** They pull the logit z_a itself, along e_a; a function of log p moves the logits
  along v = e_a - pi only. Nor is z_a - z_old known: a log-probability is a logit less a normaliser that moves as well.
- **Dense advantages: not at all**, as the tokens that were not sampled have no log-probability here.

For these, train with `lcogeom train` or `lcogeom.integrations.trl.LCOTrainer`, which see the logits. The formulas are
[DERIVED]; the interface is that of verl's public source (register_policy_loss in verl/trainer/ppo/core_algos.py, policy
losses that return a loss and a dict of metrics). verl itself could not be installed where this was tested.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PolicyLoss = Callable[..., tuple[Tensor, dict[str, float]]]
"""(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights) -> (loss, metrics)."""
Aggregate = Callable[..., Tensor]
"""verl's agg_loss(loss_mat=, loss_mask=, loss_agg_mode=, ...) -> ()."""
LOGITS_ONLY = ("lco-mse", "lco-lch")


def lco_kld_loss(
    old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, *, beta: float = 2.0, negative_beta_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """LCO-KLD of the sampled token against all others; see the head of this file. [DERIVED]

    Args:
        old_log_prob, log_prob: log pi_old(a) and log pi(a), of one shape, <= 0; natural logarithms.
        advantages: of the same shape.
        beta, negative_beta_scale: as of `lg.objective("lco-kld")`.

    Returns:
        (loss of each token, differentiable once with respect to log_prob; the target probability y_a). float32, or
        float64 where log_prob is.
    """
    dtype = torch.float64 if log_prob.dtype == torch.float64 else torch.float32
    now, old, shift = log_prob.detach().to(dtype), old_log_prob.detach().to(dtype), advantages.detach().to(dtype)
    shift = shift / (beta * torch.where(shift < 0, negative_beta_scale, 1.0))
    tiny = torch.finfo(dtype).eps  # a saturated token's 1 - p is rounding
    old_rest, rest = (torch.expm1(-(-each).clamp(min=0)).neg().clamp(min=tiny) for each in (old, now))
    # Written so that neither e^(A / beta) overflows, nor e^l underflows into 0 / 0, nor 1 - p cancels.
    raised, size = shift > 0, shift.abs()
    log_sum = torch.where(
        raised, torch.logaddexp(old_rest.log() - size, old), torch.logaddexp(old_rest.log(), old - size)
    )
    alpha = (old - log_sum).exp() * torch.expm1(-size) * torch.where(raised, -1.0, 1.0)
    log_target = old - log_sum - torch.where(raised, 0.0, size)
    target, target_rest = log_target.exp(), old_rest * (1 - alpha)
    moved = torch.maximum(now, old).exp() * torch.expm1(-(now - old).abs()) * torch.where(now > old, -1.0, 1.0)  # p - q
    slope = (moved - alpha * old_rest) / rest  # d loss / d log p = (p - y_a) / (1 - p)
    value = target * (log_target - now) + torch.special.xlogy(target_rest, target_rest / rest)
    return value + slope * (log_prob.to(dtype) - now), target


def policy_loss(
    aggregate: Aggregate, *, objective: str = "lco-kld", beta: float = 2.0, negative_beta_scale: float = 1.0
) -> PolicyLoss:
    """A function with the arguments of verl's policy losses.

    Args:
        aggregate: verl's agg_loss, or a function with its first three keyword arguments.
        objective: "lco-kld".
        beta, negative_beta_scale: as of `lg.objective("lco-kld")`.

    Raises:
        ValueError: an objective that log-probabilities do not give, or an option out of range.
    """
    if objective in LOGITS_ONLY:
        raise ValueError(
            f"objective: {objective!r} pulls raw logits, which verl's policy losses do not see; only 'lco-kld' can be "
            "had from log-probabilities. Use lcogeom.integrations.trl.LCOTrainer or `lcogeom train`."
        )
    if objective != "lco-kld":
        raise ValueError(f"objective: {objective!r}; must be 'lco-kld'.")
    for name, option in (("beta", beta), ("negative_beta_scale", negative_beta_scale)):
        if not (option > 0 and math.isfinite(option)):
            raise ValueError(f"{name}: {option}; must be a finite number > 0.")

    def loss(  # noqa: PLR0917 (verl's)
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Every tensor (sequences, response length); rollout_is_weights multiply the tokens' losses."""
        mask = response_mask.bool()
        old, now = (torch.where(mask, each, -1.0) for each in (old_log_prob, log_prob))  # behind the end: anything
        per_token, target = lco_kld_loss(
            old, now, advantages.where(mask, 0.0), beta=beta, negative_beta_scale=negative_beta_scale
        )
        if rollout_is_weights is not None:
            per_token = per_token * rollout_is_weights.where(mask, 0.0)
        whole = getattr(config, "global_batch_info", None) or {}
        total = aggregate(loss_mat=per_token, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **whole)
        with torch.no_grad():
            count = mask.sum().clamp(min=1)
            gap, drift = ((each * mask).sum() / count for each in ((now.exp() - target).abs(), old - now))
        return total, {"actor/lco_target_gap": gap.item(), "actor/ppo_kl": drift.item()}

    return loss


def register(
    name: str = "lco-kld", *, objective: str = "lco-kld", beta: float = 2.0, negative_beta_scale: float = 1.0
) -> PolicyLoss:
    """Make the loss known to verl as `policy_loss.loss_mode=NAME`; call it in every worker, by external_lib.

    Returns:
        The loss, as registered.

    Raises:
        ImportError: verl is not installed.
        RuntimeError: a verl whose policy losses have another interface.
        ValueError: as `policy_loss`.
    """
    try:
        algorithms = importlib.import_module("verl.trainer.ppo.core_algos")
    except ImportError as error:
        raise ImportError(f"verl could not be imported ({error}). Install it, in each worker's environment.") from error
    known = getattr(algorithms, "compute_policy_loss_vanilla", None)
    fits = known is not None and hasattr(algorithms, "register_policy_loss") and hasattr(algorithms, "agg_loss")
    signature = inspect.signature(known) if fits and known is not None else None
    if signature is None or "dict" not in str(signature.return_annotation):
        raise RuntimeError(
            "verl: its policy losses do not return (loss, metrics), or verl.trainer.ppo.core_algos lacks "
            "register_policy_loss or agg_loss. Use a release of verl that has them."
        )
    made = policy_loss(algorithms.agg_loss, objective=objective, beta=beta, negative_beta_scale=negative_beta_scale)
    algorithms.register_policy_loss(name)(made)
    return made
