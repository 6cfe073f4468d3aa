"""Gradients multiplied on their way to the optimiser, where no token shows it; and those that never come."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import lcogeom as lg
from tests.diagnosis.synthetic import Columns, Fault, write

AT = 10


def named(path: Path, fault: Fault) -> tuple[str, int | None]:
    report = lg.diagnose(write(path, fault))
    return report.cause, report.update


@pytest.mark.parametrize("times", [20.0, 1 / 20])
def test_all_layers_multiplied_within_the_backward_pass(times: float, tmp_path: Path) -> None:
    def summed(update: int, tokens: Columns, row: Columns, norms: Columns) -> None:
        row["gradient_scale"] *= times if update >= AT else 1.0

    assert named(tmp_path / "run", summed) == ("loss-scale-jump", AT)


def test_one_batch_whose_tokens_do_not_cancel_is_no_fault(tmp_path: Path) -> None:
    def once(update: int, tokens: Columns, row: Columns, norms: Columns) -> None:
        row["gradient_scale"] *= 12.0 if update == AT else 1.0

    assert named(tmp_path / "run", once) == ("healthy", None)


def test_gradients_multiplied_between_the_backward_pass_and_the_step(tmp_path: Path) -> None:
    def scaled(update: int, tokens: Columns, row: Columns, norms: Columns) -> None:
        row["gradient_scale"] *= 0.01  # below the norm they are clipped at
        row["after_backward"] = 8.0 if update >= AT else 1.0

    assert named(tmp_path / "run", scaled) == ("loss-scale-jump", AT)


def test_a_gradient_that_is_clipped_no_more_is_no_fault(tmp_path: Path) -> None:
    def smaller(update: int, tokens: Columns, row: Columns, norms: Columns) -> None:
        row["gradient_scale"] *= 0.97**update  # from clipped to a hundredth to not clipped at all

    assert named(tmp_path / "run", smaller) == ("healthy", None)


def test_advantages_of_which_nothing_arrives(tmp_path: Path) -> None:
    def detached(update: int, tokens: Columns, row: Columns, norms: Columns) -> None:
        if update >= AT:
            tokens["in_loss"] = np.zeros(len(tokens["in_loss"]))

    assert named(tmp_path / "run", detached) == ("no-signal", AT)


def test_a_layer_cut_off_is_named(tmp_path: Path) -> None:
    def cut(update: int, tokens: Columns, row: Columns, norms: Columns) -> None:
        if update >= AT:
            norms["received"][:2] = 0.0  # the recorder cannot know their gradient before that

    report = lg.diagnose(write(tmp_path / "run", cut))
    assert (report.cause, report.update) == ("layer-amplification", AT)
    assert report.findings[0].where == "model.layers.0"
