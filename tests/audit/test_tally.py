"""Quantiles and worst tokens of a stream against numpy over the whole of it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lcogeom.audit.tally import QUANTILE_ERROR, Quantiles, Worst

STREAMS = {
    "half zeros": lambda rng: np.where(rng.random(20_000) < 0.5, 0.0, rng.lognormal(0.0, 4.0, 20_000)),
    "all range": lambda rng: 10.0 ** rng.uniform(-307, 308, 20_000),
    "equal": lambda rng: np.full(1000, 0.37),
    "one": lambda rng: np.array([2.5]),
    "subnormal": lambda rng: np.array([5e-324, 1e-310, 1.7976931348623157e308]),
    "zeros": lambda rng: np.zeros(100),
}


@pytest.mark.parametrize("stream", STREAMS)
def test_quantiles_stay_within_the_stated_error(stream: str) -> None:
    values = STREAMS[stream](np.random.default_rng(0))
    sketch = Quantiles()
    for part in np.array_split(values, 7):
        sketch.add(part)
    assert QUANTILE_ERROR < 0.005
    for q in (0.0, 0.001, 0.1, 0.5, 0.501, 0.9, 0.99, 0.999, 1.0):
        true = np.quantile(values, q, method="inverted_cdf")
        # 1e-9 for the rounding of a bin's edge; a subnormal number has few digits of its own
        assert sketch.quantile(q) == pytest.approx(true, rel=QUANTILE_ERROR * (1 + 1e-9), abs=1e-310)
    assert sketch.largest == values.max()


def test_infinities_and_nothing() -> None:
    sketch = Quantiles()
    assert math.isnan(sketch.quantile(0.5))
    sketch.add(np.array([0.0, 1.0, math.inf]))
    assert sketch.quantile(0.1) == 0.0
    assert sketch.quantile(0.5) == pytest.approx(1.0, rel=QUANTILE_ERROR)
    assert sketch.quantile(0.9) == math.inf


@pytest.mark.parametrize("limit", [0, 1, 7, 5000])
def test_the_worst_tokens_come_in_order_and_ties_keep_the_first(limit: int) -> None:
    rng = np.random.default_rng(1)
    values = rng.integers(0, 50, 3000) / 7.0
    values[rng.integers(0, 3000, 20)] = np.nan
    worst = Worst(limit)
    for start in range(0, 3000, 333):
        worst.add(values[start : start + 333], lambda token, start=start: start + token)
    order = [int(i) for i in np.argsort(-np.nan_to_num(values), kind="stable") if values[i] > 0][:limit]
    assert [token for _, token in worst.kept] == order
