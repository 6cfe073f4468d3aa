"""Each cause is found where it was put in, and nothing is found where there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import lcogeom as lg
from lcogeom.diagnosis.baseline import usual
from lcogeom.diagnosis.ranking import ORDER
from lcogeom.diagnosis.rule_weights import poisson_tail
from tests.diagnosis.synthetic import LAYERS, Columns, Fault, sample, write

AT = 10


def at(change) -> Fault:
    """The change at update AT alone."""
    return lambda update, tokens, row, norms: change(tokens, row, norms) if update == AT else None


def since(change, start: int = AT) -> Fault:
    return lambda update, tokens, row, norms: change(tokens, row, norms) if update >= start else None


def one_huge_advantage(tokens: Columns, row: Columns, norms: Columns) -> None:
    tokens["advantage"][tokens["sequence"] == 3] = 60.0


def other_temperature(tokens: Columns, row: Columns, norms: Columns) -> None:
    tokens["old_logprob"] = 0.7 * tokens["old_logprob"]


def noisy_sampler(tokens: Columns, row: Columns, norms: Columns) -> None:
    noise = np.sin(1000 * tokens["old_logprob"])  # the same in both updates on the rollout
    tokens["old_logprob"] = tokens["old_logprob"] + 0.15 * noise


def no_advantages(tokens: Columns, row: Columns, norms: Columns) -> None:
    tokens["advantage"] = 0.0 * tokens["advantage"]


def summed_loss(tokens: Columns, row: Columns, norms: Columns) -> None:
    tokens["in_loss"] = tokens["in_loss"] * len(tokens["in_loss"])


def heavy_sequence(tokens: Columns, row: Columns, norms: Columns) -> None:
    heaviest = np.abs(tokens["advantage"]).argmax()  # one that has an advantage
    tokens["in_loss"][tokens["sequence"] == tokens["sequence"][heaviest]] *= 40


def rare_and_punished(tokens: Columns, row: Columns, norms: Columns) -> None:
    some = (tokens["sequence"] % 2 == 0) & (tokens["position"] == 1)
    tokens["advantage"][some] = -1.0
    tokens["logprob"][some] = tokens["old_logprob"][some] = -10.0


def runaway(tokens: Columns, row: Columns, norms: Columns) -> None:
    if row["step"] % 2:
        some = (tokens["sequence"] == 1) | (tokens["sequence"] == 6)
        tokens["advantage"][some] = -1.0
        tokens["logprob"][some], tokens["old_logprob"][some] = -1.0, -4.0


def tight_bounds(tokens: Columns, row: Columns, norms: Columns) -> None:
    row["clip"] = (1e-6, 1e-6)


def other_layer_gradient(tokens: Columns, row: Columns, norms: Columns) -> None:
    norms["received"][1] = 100.0


def weights_replaced(tokens: Columns, row: Columns, norms: Columns) -> None:
    norms["moved_between"][2] = 24.0
    norms["weight_norm"][2] = 36.0


def lost_moments(tokens: Columns, row: Columns, norms: Columns) -> None:
    row["step_scale"], row["step_cos_prev"] = 8.0, 0.05


def forgotten_momentum(tokens: Columns, row: Columns, norms: Columns) -> None:
    row["step_cos_prev"] = 0.1


def high_rate(tokens: Columns, row: Columns, norms: Columns) -> None:
    row["learning_rate"] = 1e-2


def nan_gradient(tokens: Columns, row: Columns, norms: Columns) -> None:
    row["grad_norm"] = float("nan")
    norms["share"][:2] = np.nan


def rounded(tokens: Columns, row: Columns, norms: Columns) -> None:
    row["moved_between"], row["step_undone"] = 0.012, 0.9
    norms["moved_between"] = np.full(len(LAYERS), 0.005)


def pushed_alike(tokens: Columns, row: Columns, norms: Columns) -> None:
    tokens["logit_grad_sum"] = np.full(len(tokens["logprob"]), 0.02)


def head_moves(tokens: Columns, row: Columns, norms: Columns) -> None:
    norms["moved_between"][-1] = 0.05


def prompt_in_loss(tokens: Columns, row: Columns, norms: Columns) -> None:
    row["outside_share"] = 0.4


def padding_marked(tokens: Columns, row: Columns, norms: Columns) -> None:
    late = (tokens["position"] >= 3) & (tokens["sequence"] % 2 == 0)
    tokens["token_id"][late] = 0
    tokens["logprob"][late] = tokens["old_logprob"][late] = -8.0


def tool_answers(tokens: Columns, row: Columns, norms: Columns) -> None:
    told = tokens["position"] >= 3
    tokens["token_id"][told] = tokens["position"][told]
    tokens["logprob"][told] = tokens["old_logprob"][told] = -6.0


def pushed_on(tokens: Columns, row: Columns, norms: Columns) -> None:
    row["clip"] = (np.inf, np.inf)
    if (tokens["logprob"] != tokens["old_logprob"]).any():
        punished = tokens["advantage"] < 0
        tokens["logprob"][punished] = tokens["old_logprob"][punished] - 3.0
        tokens["in_loss"][punished] *= 20  # whose ratio is 0.05


def not_unscaled(tokens: Columns, row: Columns, norms: Columns) -> None:
    row["loss_factor"] = 64.0
    row["gradient_scale"] *= 64.0


def one_layer_moves(tokens: Columns, row: Columns, norms: Columns) -> None:
    norms["moved_between"][1] = 0.05


def final_norm_moves(tokens: Columns, row: Columns, norms: Columns) -> None:
    norms["moved_between"][3] = 0.05


def tiny_rate(tokens: Columns, row: Columns, norms: Columns) -> None:
    row["learning_rate"] = 1e-10


def eight_bits(tokens: Columns, row: Columns, norms: Columns) -> None:
    """Off by 1 % of a nat: two engines may be as far apart always, but these were not before."""
    tokens["old_logprob"] = tokens["old_logprob"] + 0.02 * np.sin(1000 * tokens["old_logprob"])


def compounding(update: int, tokens: Columns, row: Columns, norms: Columns) -> None:
    row["logsumexp"] = 9.0 + 0.1 * np.sin(update // 2) + 0.002 * (update % 2)  # two updates on each rollout
    row["logsumexp"] *= 1.02 ** max(0, update - AT)


def begun_again(update: int, tokens: Columns, row: Columns, norms: Columns) -> None:
    """Adam's first step is as long as it can be; the later ones are not, until its state is lost."""
    row["step_scale"] = 1.0 if update in (0, AT) else 0.4


def collapse(update: int, tokens: Columns, row: Columns, norms: Columns) -> None:
    row["entropy_scale"] = 0.85 ** max(0, update - AT)
    tokens["entropy"] = tokens["entropy"].copy()


CASES = {
    "advantage-outlier": [at(one_huge_advantage), since(one_huge_advantage)],
    "behaviour-mismatch": [
        since(other_temperature),
        since(noisy_sampler),
        since(other_temperature, 0),
        since(eight_bits),
    ],
    "no-signal": [since(no_advantages), since(no_advantages, 0)],
    "loss-scale-jump": [at(summed_loss), since(summed_loss), since(summed_loss, 1), since(not_unscaled)],
    "dominant-sequence": [at(heavy_sequence), since(heavy_sequence)],
    "negative-rare-token": [at(rare_and_punished), since(rare_and_punished), since(pushed_on)],
    "ratio-blow-up": [since(runaway)],
    "clip-saturation": [since(tight_bounds), since(tight_bounds, 0)],
    "layer-amplification": [
        since(other_layer_gradient),
        at(weights_replaced),
        at(other_layer_gradient),
        since(one_layer_moves),
    ],
    "optimizer-lag": [at(lost_moments), at(forgotten_momentum)],
    "step-too-large": [at(high_rate), since(high_rate), since(high_rate, 0)],
    "non-finite": [since(nan_gradient), since(nan_gradient, 0)],
    "precision-loss": [since(rounded), since(tiny_rate)],
    "logit-drift": [since(pushed_alike), since(head_moves), since(final_norm_moves)],
    "unmasked-tokens": [since(prompt_in_loss), since(padding_marked), since(prompt_in_loss, 0), since(tool_answers)],
}
PLACES = [(cause, place) for cause, faults in CASES.items() for place in range(len(faults))]


@pytest.mark.parametrize(("cause", "place"), PLACES)
def test_the_cause_is_found_where_it_was_put_in(cause: str, place: int, tmp_path: Path) -> None:
    fault = CASES[cause][place]
    report = lg.diagnose(write(tmp_path / "run", fault, seed=place))
    first_update = next(update for update in (0, 1, AT) if _acts(fault, update))
    assert report.cause == cause, report.findings
    assert abs(report.update - first_update) <= 1
    finding = report.findings[0]
    assert finding.follows is None
    assert finding.remedy == lg.CAUSES[cause].remedy
    assert finding.evidence
    assert f"pdate {finding.update}" in finding.sentence


def _acts(fault: Fault, update: int) -> bool:
    """Whether a fault changes anything at an update."""
    seen: list[str] = []

    class Watched(dict):
        def __setitem__(self, key: str, value: object) -> None:
            seen.append(key)

        def __getitem__(self, key: str) -> object:
            seen.append(key)
            return update if key == "step" else np.ones(8)

        def __missing__(self, key: str) -> object:
            return np.ones(8)

    fault(update, Watched(), Watched(), Watched())
    return bool(seen)


def test_ratios_that_underflow_to_nothing(tmp_path: Path) -> None:
    """An unclipped loss of log pi, as REINFORCE's, has a gradient at a ratio of 0."""
    run = lg.load_run(write(tmp_path / "run"))
    tokens = run.tokens
    gone = (tokens["step"] == AT + 1) & (tokens["advantage"] < 0)
    tokens.loc[gone, ["ratio", "d1", "logit_grad_norm"]] = 0.0, 1.0, 1.0
    report = lg.diagnose(replace(run, tokens=tokens))
    assert "negative-rare-token" in {finding.cause for finding in report.findings}


def test_logits_that_grow_by_a_factor_at_each_update(tmp_path: Path) -> None:
    report = lg.diagnose(write(tmp_path / "run", compounding))
    assert report.cause == "logit-drift"
    assert abs(report.update - AT) <= 1


def test_an_optimiser_that_begins_again(tmp_path: Path) -> None:
    report = lg.diagnose(write(tmp_path / "run", begun_again))
    assert (report.cause, report.update) == ("optimizer-lag", AT)
    assert "began again" in report.findings[0].sentence


def test_a_schedule_that_ends_at_nothing_loses_no_precision(tmp_path: Path) -> None:
    def decays(update: int, tokens: Columns, row: Columns, norms: Columns) -> None:
        row["learning_rate"] = 1e-5 * 0.5 * (1 + np.cos(np.pi * update / 400)) + 1e-13

    assert lg.diagnose(write(tmp_path / "run", decays, updates=400)).findings == ()


def test_an_fp16_scale_that_adapts_is_no_fault(tmp_path: Path) -> None:
    def scaled(update: int, tokens: Columns, row: Columns, norms: Columns) -> None:
        scale = 65536.0 / 2 ** min(update, 4) * (2 if update > 12 else 1)
        row["loss_factor"], row["gradient_scale"] = scale, row["gradient_scale"] * scale

    assert lg.diagnose(write(tmp_path / "run", scaled)).findings == ()


def test_entropy_that_falls_is_a_collapse_and_one_that_varies_is_none(tmp_path: Path) -> None:
    report = lg.diagnose(write(tmp_path / "falls", collapse, updates=40))
    assert report.cause == "entropy-collapse"
    assert AT - 2 <= report.update <= AT + 6
    assert lg.diagnose(write(tmp_path / "varies", updates=40)).cause == "healthy"


def test_entropy_that_falls_while_rewards_rise_is_learning(tmp_path: Path) -> None:
    def learns(update: int, tokens: Columns, row: Columns, norms: Columns) -> None:
        row["entropy_scale"] = max(0.2, 1 - update / 40)
        row["reward"] = 0.3 + 0.6 * update / 60

    assert lg.diagnose(write(tmp_path / "run", learns, updates=60)).findings == ()


def minibatches(update: int, tokens: Columns, row: Columns, norms: Columns) -> None:
    """Four updates a rollout, each on tokens of its own: when the last ones come, the policy has moved."""
    rng = np.random.default_rng(update)
    tokens |= sample(rng)
    moved = 0.08 * (update % 4) * (tokens["advantage"] + rng.normal(size=len(tokens["logprob"])))
    tokens["logprob"] = np.minimum(tokens["logprob"] + moved, -1e-6)


def test_minibatches_are_no_mismatch_and_hide_none(tmp_path: Path) -> None:
    assert lg.diagnose(write(tmp_path / "minibatches", minibatches, updates=40)).findings == ()

    def mismatched(update: int, tokens: Columns, row: Columns, norms: Columns) -> None:
        minibatches(update, tokens, row, norms)
        if update >= 20:
            tokens["old_logprob"] = 0.3 * tokens["old_logprob"]

    report = lg.diagnose(write(tmp_path / "mismatched", mismatched, updates=40))
    assert report.cause == "behaviour-mismatch"
    assert report.update == 20


@pytest.mark.parametrize("seed", range(12))
def test_nothing_is_found_in_a_healthy_run(seed: int, tmp_path: Path) -> None:
    report = lg.diagnose(write(tmp_path / "run", seed=100 + seed))
    assert report.findings == ()
    assert report.cause == "healthy"
    assert report.update is None


def test_a_layer_is_named(tmp_path: Path) -> None:
    for fault, name in ((other_layer_gradient, LAYERS[1]), (weights_replaced, LAYERS[2])):
        report = lg.diagnose(write(tmp_path / fault.__name__, at(fault)))
        assert report.findings[0].where == name


def test_clipping_layer_by_layer_is_no_fault(tmp_path: Path) -> None:
    def own_bounds(update: int, tokens: Columns, row: Columns, norms: Columns) -> None:
        norms["received"] = np.array([0.1, 0.2, 0.9, 1.0, 0.5])

    assert lg.diagnose(write(tmp_path / "run", own_bounds)).findings == ()


def test_tokens_and_share_of_a_finding(tmp_path: Path) -> None:
    report = lg.diagnose(write(tmp_path / "run", at(one_huge_advantage)))
    finding = report.findings[0]
    assert finding.where == "sequence 3"
    assert set(finding.tokens["sequence"]) == {3}
    assert set(finding.tokens["step"]) == {AT}
    assert finding.tokens["share"].is_monotonic_decreasing
    assert finding.share == pytest.approx(finding.tokens["share"].sum())
    assert finding.share > 0.9


def test_what_followed_stands_behind_what_came_first(tmp_path: Path) -> None:
    """A learning rate that destroys the policy: ratios run away in the next update, entropy breaks down later."""

    def chain(update: int, tokens: Columns, row: Columns, norms: Columns) -> None:
        if update == AT:
            row["learning_rate"] = 1e-2
        if update == AT + 1:
            runaway(tokens, row, norms)
        if update > AT + 4:
            no_advantages(tokens, row, norms)

    report = lg.diagnose(write(tmp_path / "run", chain))
    assert [finding.cause for finding in report.findings][:1] == ["step-too-large"]
    followed = {finding.cause: finding.follows for finding in report.findings[1:]}
    assert followed == {"ratio-blow-up": "step-too-large", "no-signal": "step-too-large"}


def test_two_faults_that_have_nothing_to_do_with_each_other(tmp_path: Path) -> None:
    def both(update: int, tokens: Columns, row: Columns, norms: Columns) -> None:
        if update == 14:
            row["outside_share"] = 0.3
        if update == 8:
            summed_loss(tokens, row, norms)

    found = lg.diagnose(write(tmp_path / "run", both)).findings
    assert [(one.cause, one.update, one.follows) for one in found] == [
        ("loss-scale-jump", 8, None),
        ("unmasked-tokens", 14, None),
    ]


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    def silent(update: int, tokens: Columns, row: Columns, norms: Columns) -> None:
        row["outside_share"] = None
        tokens["advantage"] = tokens["advantage"] * np.nan

    report = lg.diagnose(write(tmp_path / "run", silent))
    named = {(one.cause, one.column) for one in report.missing}
    assert {("unmasked-tokens", "outside_share"), ("advantage-outlier", "advantage")} <= named


def test_weights_in_bf16_whose_steps_are_lost(tmp_path: Path) -> None:
    assert lg.diagnose(write(tmp_path / "run", weights={"bfloat16": 100_000})).cause == "precision-loss"


def test_causes_are_the_closed_list() -> None:
    assert set(lg.CAUSES) == {*CASES, "entropy-collapse"}
    assert list(ORDER) == list(lg.CAUSES)
    for cause in lg.CAUSES.values():
        assert set(cause.brings) <= set(lg.CAUSES) - {cause.id} | {cause.id}


def test_baselines() -> None:
    values = np.array([1.0, 1.1, 0.9, 1.0, 0.0, np.nan, 10.0])
    known = usual(values)
    assert np.isnan(known.level[:3]).all()
    assert known.level[6] == pytest.approx(1.0, rel=0.05)
    assert np.exp(known.excess[6]) == pytest.approx(10, rel=0.05)
    assert known.scatter[6] > 0.1  # the prior: four alike values do not make the fifth an event


@pytest.mark.parametrize(("n", "mean", "expected"), [(0, 1.0, 1.0), (1, 1.0, 0.6321206), (4, 0.15, 1.88e-5)])
def test_poisson_tail(n: int, mean: float, expected: float) -> None:
    """Against the closed form 1 - exp(-m) sum m^k / k!."""
    assert poisson_tail(n, mean) == pytest.approx(expected, rel=0.01)
