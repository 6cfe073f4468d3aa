"""diagnose(): from a run, a run folder or a plain log to a report."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from lcogeom.diagnosis.baseline import first, usual
from lcogeom.diagnosis.finding import Finding, Report
from lcogeom.diagnosis.ranking import rank
from lcogeom.diagnosis.rule_data import advantage_outlier, behaviour_mismatch, no_signal, unmasked_tokens
from lcogeom.diagnosis.rule_layers import layer_amplification
from lcogeom.diagnosis.rule_policy import entropy_collapse, logit_drift, non_finite
from lcogeom.diagnosis.rule_ratios import clip_saturation, ratio_blow_up
from lcogeom.diagnosis.rule_scale import loss_scale_jump
from lcogeom.diagnosis.rule_steps import optimizer_lag, precision_loss, step_too_large
from lcogeom.diagnosis.rule_weights import dominant_sequence, negative_rare_token
from lcogeom.diagnosis.signals import Signals, signals_of
from lcogeom.runs import Run, glossary, load_run
from lcogeom.runs.columns import schema

SPIKE, SURE = np.log(10.0), 5.0
"""Of a gradient that is worth a note: times its median before (the black box's own trigger), and in scatters of it."""

RULES: tuple[Callable[[Signals], list[Finding]], ...] = (
    unmasked_tokens,
    behaviour_mismatch,
    advantage_outlier,
    no_signal,
    loss_scale_jump,
    ratio_blow_up,
    negative_rare_token,
    dominant_sequence,
    clip_saturation,
    layer_amplification,
    optimizer_lag,
    step_too_large,
    precision_loss,
    entropy_collapse,
    logit_drift,
    non_finite,
)


def diagnose(run: Run | str | Path) -> Report:
    """What went wrong in a run, what came first, and what to try.

    Args:
        run: from `load_run`; the path of a run folder; or that of a plain log: TRL's `trainer_state.json` or its
            `log_history` as JSON, or a CSV exported from W&B or verl's console log, with what those allow.

    Returns:
        The report. `findings` is empty for a run without any; `missing` names columns that were not there and would
        have decided; `notes` what was damaged, missing or not understood in the folder.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: it holds no update, or several runs; a file that is no log of a training run.
    """
    if isinstance(run, Run):
        tables = run
    elif Path(run).is_file():
        from lcogeom.diagnosis.logs import read_log

        signals, notes = read_log(Path(run))
        tokens, norms = (schema(table).empty_table().to_pandas() for table in ("tokens", "norms"))
        tables = Run(Path(run), signals.meta, signals.updates, tokens, norms, glossary(), ())
        return replace(report_of(signals, notes), run=tables)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is damaged is told in the report's notes
            tables = load_run(run)
    signals, notes = signals_of(tables)
    return replace(report_of(signals, notes), run=tables)


def report_of(signals: Signals, notes: list[str]) -> Report:
    """The report of what the rules find."""
    findings = rank(finding for rule in RULES for finding in rule(signals))
    notes = notes + ([] if findings else _unexplained(signals))
    found = {finding.cause for finding in findings}
    missing = tuple(one for one in signals.missing if one.cause not in found)
    return Report(signals.source, signals.size, findings, missing, tuple(notes), dict(signals.meta))


def _unexplained(signals: Signals) -> list[str]:
    """A gradient far above all before that no rule accounts for: said, but no finding."""
    gradient = signals.gradient
    if gradient is None:
        return []
    known = usual(gradient, least=5)
    at = first((known.excess > SPIKE) & (known.score > SURE))
    if at is None:
        return []
    times = np.exp(known.excess[at])
    return [
        f"at update {signals.steps[at]} the gradient's norm is {gradient[at]:.3g}, {times:.3g} times its median "
        "before, and nothing that was recorded says why"
    ]
