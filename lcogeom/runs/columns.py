"""Every recorded column: name, type, unit, meaning. The one list of them; the glossary and the file schema follow."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import pandas as pd
import pyarrow as pa

TABLES = ("sketches", "tokens", "norms", "updates")
"""In the order in which they are flushed: an update's row appears only after its tokens, norms and sketches."""

ESTIMATED = "; from sketches, unless recorded with copies=True: norms to 0.6 %, cosines to 0.008 (one standard error)"

NOTED = {
    "reward": ("reward", "mean reward of the rollout this update was made from"),
    "heldout_reward": ("reward", "mean reward on the held-out problems before this update; null between evaluations"),
    "heldout_reward_after": ("reward", "the same after this update; of the last update of a run"),
    "rollouts": ("1", "completions trained on so far, those of this update's rollout included"),
    "learning_rate": ("1", "of this update; the optimiser's first group's where the loop notes none"),
    "kept_share": ("1", "share of the completion tokens that the intervention kept"),
    "critic_loss": ("reward^2", "mean over tokens of half the squared error of the critic's values"),
    "rollout_seconds": ("s", "wall time of the rollout: sampling, rewards, advantages, old policy"),
}
"""Columns of `updates` that a training loop fills, by `Probe.note`: unit, meaning."""

SIGNS = {"_positive": "tokens with A > 0", "_negative": "tokens with A < 0"}


@dataclass(frozen=True)
class Column:
    table: str
    name: str
    type: str
    """int64, float64, bool, string or binary; null where a value is not known."""
    unit: str
    meaning: str


def _split(name: str, kind: str, unit: str, meaning: str) -> list[Column]:
    """The column over all tokens, and again over each sign of the advantage."""
    rows = [Column("updates", name, kind, unit, meaning)]
    return rows + [Column("updates", name + end, kind, unit, f"{name}, {which} only") for end, which in SIGNS.items()]


def _audit(**meanings: str) -> list[Column]:
    """The parts of the audit of one update (method.md, section 3); null in updates that were not audited."""
    return [Column("updates", f"audit_{name}", "float64", "loss", meaning) for name, meaning in meanings.items()]


COLUMNS: list[Column] = [
    Column("updates", "step", "int64", "1", "optimiser steps before this one; the first is 0"),
    Column("updates", "seconds", "float64", "s", "wall time from attach() to the end of this update"),
    Column("updates", "objective", "string", "", "the objective named at attach(), null where none was"),
    Column(
        "updates",
        "loss",
        "float64",
        "loss",
        "of the losses handed to batch(): mean over the update's backward passes, or sum where each is a part of it",
    ),
    Column("updates", "grad_norm", "float64", "loss / weight", "Euclidean norm of the gradient before clipping"),
    Column("updates", "grad_norm_clipped", "float64", "loss / weight", "the same as the optimiser received it"),
    Column(
        "updates",
        "qkv_mean_frobenius",
        "float64",
        "loss / weight",
        "unweighted mean of the Frobenius norms of all query, key and value projection gradients, before clipping; "
        "fused projections are split, those of latent attention lead from the latents (arXiv 2603.00963's measure, "
        "systems.md 1.4)",
    ),
    Column(
        "updates",
        "update_norm",
        "float64",
        "weight",
        "Euclidean norm of the step d = theta_new - theta_old" + ESTIMATED,
    ),
    Column(
        "updates",
        "weight_norm",
        "float64",
        "weight",
        "Euclidean norm of the trained weights before the step" + ESTIMATED,
    ),
    Column(
        "updates",
        "moved_between",
        "float64",
        "weight",
        "Euclidean norm of what changed the weights between the last step and this one: 0 in an ordinary loop; from "
        "sketches, null with copies=True",
    ),
    Column(
        "updates",
        "step_undone",
        "float64",
        "1",
        "share of the last step that this change took back (its part along the step); from sketches",
    ),
    Column("updates", "step_cos_prev", "float64", "1", "cosine of the step with the last one; from sketches"),
    Column(
        "updates", "grad_cos_prev", "float64", "1", "cosine of this gradient with the previous update's" + ESTIMATED
    ),
    Column(
        "updates",
        "step_grad_cos",
        "float64",
        "1",
        "cosine of the step d with -gradient, as the optimiser got it" + ESTIMATED,
    ),
    *_split("logprob", "float64", "nat", "mean log-probability of the actions, current policy"),
    *_split("action_prob", "float64", "1", "mean probability of the actions, current policy"),
    *_split("entropy", "float64", "nat", "mean entropy of the policy over the whole vocabulary"),
    *_split(
        "logit_grad_norm",
        "float64",
        "loss",
        "Euclidean norm of d loss / d logits over all completion tokens of the update; null where tokens whose own is "
        "not known may make more than 0.1 % of its square",
    ),
    *_split("ratio_min", "float64", "1", "smallest recorded probability ratio, current / behaviour policy"),
    *_split("ratio_q05", "float64", "1", "5 % quantile of the recorded ratios, by weight"),
    *_split("ratio_median", "float64", "1", "median of the recorded ratios, by weight"),
    *_split("ratio_q95", "float64", "1", "95 % quantile of the recorded ratios, by weight"),
    *_split("ratio_max", "float64", "1", "largest recorded ratio"),
    *_split("convex_share", "float64", "1", "share of tokens at which the loss is convex in the logits"),
    *_split("logsumexp", "float64", "nat", "mean over the tokens of the log normaliser of the softmax"),
    Column(
        "updates",
        "loss_factor",
        "float64",
        "1",
        "what the losses handed to batch() were multiplied by before the backward passes: their sum over the update's "
        "passes (1 where each of K is divided by K), or their mean where the losses are parts of a sum; an fp16 scale "
        "is in it; null where no loss with a graph was handed over",
    ),
    Column(
        "updates",
        "outside_share",
        "float64",
        "1",
        "share of the squared norm of the gradient, where it is read (logits, hidden states), that lies outside the "
        "completion tokens marked in batch(); null where none were marked",
    ),
    *_split("tokens", "int64", "1", "completion tokens in the update (by sign: estimated where not all are recorded)"),
    *_audit(
        actual="what the step did to the mean of the objective over the update's completion tokens, dropout off",
        first_order="<g, d>: what the gradient promised",
        gauss_newton="1/2 d^T J^T H_z J d: curvature along the step that comes through the logits",
        residual="1/2 d^T (H - J^T H_z J) d: curvature along the step that is the network's own",
        remainder="actual - first_order - gauss_newton - residual",
        logit_first_order="<grad_z, dz> with the finite displacement dz of the logits",
        logit_curvature="1/2 dz^T H_z dz",
        logit_remainder="actual - logit_first_order - logit_curvature",
        rounding="how far audit_actual may be off because logits are rounded to their dtype",
    ),
    Column(
        "updates", "audit_overshoot", "float64", "1", "d^T H d / |<g, d>|: above 1 the step passed the minimum along d"
    ),
    *[Column("updates", name, "float64", unit, meaning) for name, (unit, meaning) in NOTED.items()],
    Column("tokens", "step", "int64", "1", "the update this token was part of"),
    Column("tokens", "sequence", "int64", "1", "row of the batch, counted through the update's backward passes"),
    Column("tokens", "position", "int64", "1", "place in the completion, from 0; in the input where that is unknown"),
    Column("tokens", "token_id", "int64", "1", "the action a"),
    Column("tokens", "text", "string", "", "the action decoded, null without a tokenizer"),
    Column("tokens", "weight", "float64", "1", "how many tokens this row stands for; weighted means are unbiased"),
    Column("tokens", "advantage", "float64", "reward", "A of the sampled action"),
    Column("tokens", "logprob", "float64", "nat", "l = log pi, current policy"),
    Column("tokens", "old_logprob", "float64", "nat", "log-probability under the behaviour policy"),
    Column("tokens", "ratio", "float64", "1", "r = exp(logprob - old_logprob)"),
    Column("tokens", "prob", "float64", "1", "pi, the action's probability"),
    Column("tokens", "entropy", "float64", "nat", "entropy of the policy at this token"),
    Column("tokens", "sum_sq_prob", "float64", "1", "sum over the vocabulary of p^2"),
    Column("tokens", "logsumexp", "float64", "nat", "log sum_j exp(z_j), z as it enters the softmax"),
    Column("tokens", "logit_grad_norm", "float64", "loss", "Euclidean norm of d loss / d logits at this token"),
    Column(
        "tokens",
        "logit_grad_sum",
        "float64",
        "loss",
        "sum over the vocabulary of d loss / d logits: 0 for every loss of probabilities; null but at the logits",
    ),
    Column("tokens", "d1", "float64", "loss", "f'(l) of the back-propagated loss; null for a loss that is no f(l)"),
    Column("tokens", "d2", "float64", "loss", "f''(l) of the back-propagated loss; null where it does not follow"),
    Column(
        "tokens",
        "misfit",
        "float64",
        "1",
        "relative distance of the gradient seen from the best multiple of the declared objective's (of u = e_a - p "
        "where none is declared): near 0 when the loss is what it says",
    ),
    Column("tokens", "convex", "bool", "", "whether the loss is convex in the logits here (method.md 2.2)"),
    Column("tokens", "negative_count", "int64", "1", "negative eigenvalues of the loss's Hessian in the logits"),
    Column("norms", "step", "int64", "1", "the update"),
    Column("norms", "scope", "string", "", "'layer' (a numbered block, or a module outside them) or 'group'"),
    Column("norms", "name", "string", "", "module path of the layer, or index of the optimiser's parameter group"),
    Column("norms", "grad_norm", "float64", "loss / weight", "Euclidean norm of its gradient before clipping"),
    Column("norms", "grad_norm_clipped", "float64", "loss / weight", "the same as the optimiser received it"),
    Column("norms", "update_norm", "float64", "weight", "Euclidean norm of its part of the step"),
    Column("norms", "weight_norm", "float64", "weight", "Euclidean norm of its weights before the step"),
    Column("norms", "moved_between", "float64", "weight", "of `updates`, its part"),
    Column("sketches", "step", "int64", "1", "the update"),
    Column(
        "sketches", "vector", "string", "", "'gradient' g_t as the optimiser got it, 'step' d_t, or 'weights' theta_t"
    ),
    Column("sketches", "layer", "string", "", "module path of the layer whose part this is; null: all parameters"),
    Column(
        "sketches", "values", "binary", "of vector", "its linear sketch (lcogeom.sketch, seed 0): little-endian float32"
    ),
]


def glossary() -> pd.DataFrame:
    """The columns as a table: table, name, type, unit, meaning."""
    return pd.DataFrame([asdict(column) for column in COLUMNS])


def schema(table: str) -> pa.Schema:
    """The file schema of one table."""
    return pa.schema([(column.name, pa.type_for_alias(column.type)) for column in COLUMNS if column.table == table])
