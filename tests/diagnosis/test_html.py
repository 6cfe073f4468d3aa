"""The page: complete, small and safe without a browser; in a real one it opens in silence and answers to pointing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import lcogeom as lg
from lcogeom.diagnosis import Report
from lcogeom.diagnosis.html import MOST_UPDATES, html_page, write_html
from lcogeom.diagnosis.page.text import figure, percent, visible
from lcogeom.diagnosis.page.timelines import MOST_POINTS, thinned
from lcogeom.diagnosis.page.tokens import SHADES
from tests.diagnosis.chromium import Page, chromium
from tests.diagnosis.exploded import AT, HOSTILE, record, report_of

needs_chromium = pytest.mark.skipif(chromium() is None, reason="no Chromium found; apt-get install chromium")
OVERLAPS = """[...document.querySelectorAll("figure > svg")].flatMap((drawing) => {
  const boxes = [...drawing.querySelectorAll("text")].map((text) => [text.textContent, text.getBoundingClientRect()]);
  const frame = drawing.getBoundingClientRect();
  const out = (b) => b.left < frame.left - 1 || b.right > frame.right + 1 || b.bottom > frame.bottom + 1;
  const wide = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left);
  const high = (a, b) => Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
  return boxes.filter(([, a]) => out(a)).map(([name]) => `${name} leaves its drawing`).concat(
    boxes.flatMap(([name, a], place) => boxes.slice(place + 1)
      .filter(([, b]) => wide(a, b) > 1 && high(a, b) > 3).map(([other]) => `${name} touches ${other}`)));
})"""
CONTRAST = """[...document.querySelectorAll(".legend .t:not(.bad):not(.unknown)")].map((key) => {
  const light = (text) => text.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, place) => sum + c * [0.2126, 0.7152, 0.0722][place], 0.05);
  const style = getComputedStyle(key);
  return light(style.backgroundColor) / light(style.color);
})"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> lg.Run:
    return record(tmp_path_factory.mktemp("exploded") / "run")


@pytest.fixture(scope="module")
def file(run: lg.Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_html(report_of(run), run, path)
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with Page(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser: Page, file: Path) -> Page:
    browser.resize(1200, 900)
    browser.complaints.clear()
    browser.open(file)
    return browser


def test_same_report_same_page(run: lg.Run, tmp_path: Path) -> None:
    page = html_page(report_of(run), run)
    replace(report_of(run), run=run).write_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == page
    with pytest.raises(ValueError, match=r"run: this report knows no run to draw; .* diagnose\(\)"):
        report_of(run).write_html(tmp_path / "report.html")


@needs_chromium
def test_it_opens_in_silence_with_every_part(page: Page, run: lg.Run) -> None:
    assert page.complaints == []
    shown = page.value("document.body.innerText")
    for text in (
        "step-too-large",
        "ratio-blow-up",
        "Gradient norm",
        "Phase diagram",
        "Layer profile: step",
        "Not recorded",
    ):
        assert text in shown, text
    assert page.value("document.title").startswith("step-too-large")
    assert page.value("[...document.querySelectorAll('section[id]')].map((one) => one.id)") == [
        f"update-{AT}",
        f"update-{AT + 1}",
    ]
    panels = page.value("document.querySelectorAll('.panel').length")
    assert panels >= 8
    assert page.value("document.querySelectorAll('.event.first').length") == panels
    layers = (run.norms["scope"] == "layer").sum() / len(run.updates)
    assert page.value(f"document.querySelectorAll('#update-{AT} .now').length") == 2 * layers + 2  # and the keys
    assert page.value(f"document.querySelectorAll('#update-{AT} .chosen').length") == 2


@needs_chromium
@pytest.mark.parametrize("place", [".text .t", "circle.p"])
def test_pointing_at_a_token_shows_its_numbers(page: Page, run: lg.Run, place: str) -> None:
    rows = run.tokens[run.tokens["step"] == AT + 1].sort_values("logit_grad_norm", ascending=False, kind="stable")
    heaviest = rows.iloc[0]
    key = page.value(f"Math.min(...[...document.querySelectorAll('#update-{AT + 1} [data-k]')].map(e => +e.dataset.k))")
    page.point_at(f'#update-{AT + 1} {place}[data-k="{key}"]')
    box = page.value("document.getElementById('box').innerText")
    shares = rows["weight"] * rows["logit_grad_norm"] ** 2
    convex = "yes" if heaviest["convex"] else f"no, {heaviest['negative_count']} negative"
    for text in (
        visible(heaviest["text"]).strip(),
        f"advantage A\t{figure(heaviest['advantage'])}",
        f"probability π\t{figure(heaviest['prob'])} ",
        f"ratio r\t{figure(heaviest['ratio'])} ",
        f"f′\t{figure(heaviest['d1'])}",
        f"f″\t{figure(heaviest['d2'])}",
        f"convex\t{convex}",
        percent(heaviest["logit_grad_norm"] ** 2 / shares.sum()),
    ):
        assert text in box
    assert page.value("document.querySelectorAll('.t.lit').length") == 1
    assert page.value("document.querySelectorAll('.p.lit').length") == 1
    page.point_at("h1")
    assert page.value("document.getElementById('box').style.display") == "none"


@needs_chromium
def test_tokens_are_coloured_by_their_share(page: Page, run: lg.Run) -> None:
    rows = run.tokens[run.tokens["step"] == AT]
    squares = rows["weight"] * rows["logit_grad_norm"] ** 2
    by_sequence = (squares / squares.sum()).groupby(rows["sequence"]).sum().sort_values(ascending=False)
    shown = page.value(
        f"[...document.querySelectorAll('#update-{AT} .sequence')].map((line) => [line.firstChild.innerText, "
        "[...line.querySelectorAll('.t')].map((token) => token.className)])"
    )
    assert len(shown) == len(by_sequence)
    for (said, classes), (name, part) in zip(shown, by_sequence.items(), strict=True):
        assert said.startswith(f"sequence {name} ")
        assert said.endswith(percent(part))
        tokens = rows[rows["sequence"] == name].sort_values("position")
        for kind, (_, token) in zip(classes, tokens.iterrows(), strict=True):
            level = int(np.sum(token["logit_grad_norm"] ** 2 / squares.sum() >= np.array(SHADES)))
            down = -token["d1"] < 0
            assert kind == f"t {'d' if down else 'u'}{level}" + ("" if token["convex"] else " bent")
    assert len({kind for _, classes in shown for kind in classes}) > 4


@needs_chromium
def test_markers_of_many_findings_do_not_overlap(run: lg.Run, browser: Page, tmp_path: Path) -> None:
    first = report_of(run).findings[0]
    updates = [8, *range(12), 3, 3, 3, 4, 4, 5]
    write_html(
        Report("run", 12, tuple(replace(first, update=update) for update in updates), (), ()), run, tmp_path / "x.html"
    )
    browser.resize(600, 900)
    browser.open(tmp_path / "x.html")
    assert browser.value("document.querySelectorAll('.panel')[0].querySelectorAll('.chip').length") == 12
    assert browser.value(OVERLAPS) == []


@needs_chromium
def test_pointing_at_a_time_line_reads_off_every_line(page: Page, run: lg.Run) -> None:
    left, right = (float(x) / 560 for x in page.value("document.querySelector('.panels').dataset.x").split()[2:])
    steps = run.updates["step"]
    page.point_at(".panel > svg", left + AT / steps.max() * (right - left))
    read = page.value("document.querySelector('.panel output').textContent")
    assert read == f"{figure(run.updates['grad_norm'][AT])} at {AT}"
    step = page.value("[...document.querySelectorAll('.panel')].find(e => e.innerText.includes('θ after')).innerText")
    assert f"{figure(run.updates['update_norm'][AT])} at {AT}" in step


@needs_chromium
def test_text_of_the_model_stays_text(page: Page, file: Path, tmp_path: Path) -> None:
    assert page.value("window.hacked") is None
    assert page.value("document.querySelectorAll('img, main script, main style, body > style').length") == 0
    assert page.value("getComputedStyle(document.body).display") == "block"
    texts = page.value("[...document.querySelectorAll('.text .t')].map((one) => one.textContent)")
    for hostile in HOSTILE:
        assert visible(hostile) in texts
    assert visible(HOSTILE[0]) in page.value("document.querySelector('#finding-2').textContent")
    for token in range(len(HOSTILE)):
        page.point_at(f".text .t:nth-child({token + 1})")
        assert page.value("window.hacked") is None
    # And were escaping ever forgotten, the page's policy would still not let it run.
    broken = tmp_path / "broken.html"
    broken.write_text(file.read_text().replace("</main>", f"{HOSTILE[0]}<p onclick='1'>{HOSTILE[2]}</main>", 1))
    page.open(broken)
    assert page.value("window.hacked") is None
    assert any("Content Security Policy" in text for text in page.complaints)
    assert page.value("getComputedStyle(document.body).display") == "block"


@needs_chromium
@pytest.mark.parametrize("width", [1200, 600, 380])
def test_nothing_overlaps_or_is_cut_off(page: Page, width: int) -> None:
    page.resize(width, 900)
    assert page.value("document.documentElement.scrollWidth") <= width
    page.value("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.value(OVERLAPS) == []
    if width >= 600:
        scrolls = "[...document.querySelectorAll('.wide')].filter((one) => one.scrollWidth > one.clientWidth).length"
        assert page.value(scrolls) == 0


@needs_chromium
def test_text_on_colours_can_be_read(page: Page) -> None:
    contrast = page.value(CONTRAST)
    assert len(contrast) >= 12
    assert min(contrast) > 4.5  # WCAG 2.2, level AA


def no_tokens(run: lg.Run) -> lg.Run:
    return replace(run, tokens=run.tokens.iloc[:0])


def no_columns(run: lg.Run) -> lg.Run:
    return replace(run, updates=run.updates[["step"]], tokens=run.tokens[["step"]], norms=run.norms[["step"]])


def no_frames(run: lg.Run) -> lg.Run:
    return replace(run, updates=pd.DataFrame(), tokens=pd.DataFrame(), norms=pd.DataFrame(), meta={})


def one_update(run: lg.Run) -> lg.Run:
    first = {name: table[table["step"] == 0] for name, table in vars(run).items() if name in ("tokens", "norms")}
    return replace(run, updates=run.updates.iloc[:1], **first)


def nothing_finite(run: lg.Run) -> lg.Run:
    bad = {name: np.nan if place % 2 else np.inf for place, name in enumerate(run.updates.columns[3:])}
    worse = {name: -np.inf for name in ("logit_grad_norm", "prob", "advantage", "ratio", "d1", "logprob")}
    norms = run.norms.assign(grad_norm=np.nan)
    return replace(run, updates=run.updates.assign(**bad), tokens=run.tokens.assign(**worse), norms=norms)


def strangers(run: lg.Run) -> lg.Run:
    odd = run.tokens.assign(text=None, prob="high", convex=None, sequence=pd.NA, position=pd.NA)
    return replace(run, updates=run.updates.assign(**{"<b>": 1.0, "grad_norm": "?"}), tokens=odd)


def huge_numbers(run: lg.Run) -> lg.Run:
    norms = run.tokens["logit_grad_norm"].fillna(1) * 1e200
    updates = run.updates.assign(grad_norm=run.updates["step"].astype(float) * 1e300, loss=-1e307)
    return replace(run, updates=updates, tokens=run.tokens.assign(logit_grad_norm=norms, ratio=1e-300, prob=0.0))


def deep_and_sure(run: lg.Run) -> lg.Run:
    """Forty layers, probabilities next to 1, a loss around 0 with one spike, gradients unknown at some tokens."""
    layer = run.norms[run.norms["name"] == "model.layers.1"]
    norms = pd.concat([layer.assign(name=f"model.layers.{place}") for place in range(40)], ignore_index=True)
    loss = np.where(run.updates["step"] == AT + 1, 0.2, np.where(run.updates["step"] % 2, -0.003, 1e-9))
    rows = np.arange(len(run.tokens))
    tokens = run.tokens.assign(
        prob=1 - 10.0 ** -(rows % 12), logit_grad_norm=np.where(rows % 5, run.tokens["logit_grad_norm"], np.nan)
    )
    return replace(run, updates=run.updates.assign(loss=loss), tokens=tokens, norms=norms)


MISSING = (deep_and_sure, no_tokens, no_columns, no_frames, one_update, nothing_finite, strangers, huge_numbers)


@pytest.mark.filterwarnings("error")
@needs_chromium
@pytest.mark.parametrize("less", MISSING)
def test_a_run_that_lacks_something(
    less: Callable[[lg.Run], lg.Run], run: lg.Run, browser: Page, tmp_path: Path
) -> None:
    file = tmp_path / "report.html"
    write_html(report_of(run), less(run), file)
    browser.resize(600, 900)
    browser.complaints.clear()
    browser.open(file)
    assert browser.complaints == []
    assert browser.value("document.querySelectorAll('section').length") == 3
    drawn = "[...document.querySelectorAll('main svg *')].flatMap(e => [...e.attributes]).map(a => a.value)"
    assert [text for text in browser.value(drawn) if "nan" in text.lower() or "inf" in text.lower()] == []
    assert browser.value(OVERLAPS) == []
    unknown = browser.value("document.querySelectorAll('.text .unknown').length")
    assert (unknown > 0) == (less in (deep_and_sure, no_columns)), "a gradient that is not known is no infinite one"


def test_a_healthy_run_shows_its_largest_update(run: lg.Run) -> None:
    page = html_page(Report("run", len(run.updates), (), (), ()), run)
    largest = int(run.updates["step"][run.updates["grad_norm"].argmax()])
    assert f'<section id="update-{largest}">' in page
    assert "<b>Healthy</b>" in page
    assert 'class="event' not in page


def test_a_long_run_with_many_tokens_stays_small(run: lg.Run, tmp_path: Path) -> None:
    count, each = 10_000, 8_192
    rng = np.random.default_rng(0)
    updates = run.updates.iloc[np.arange(count) % 8].assign(step=np.arange(count))
    updates["grad_norm"] *= rng.lognormal(size=count)
    events = [7_000, 7_001, 7_002, 7_003, 7_004]
    tokens = run.tokens.iloc[np.arange(len(events) * each) % len(run.tokens)].assign(step=np.repeat(events, each))
    finding = report_of(run).findings[0]
    report = Report("run", count, tuple(replace(finding, update=update) for update in events), (), ())
    start = time.process_time()
    write_html(report, replace(run, updates=updates, tokens=tokens), tmp_path / "long.html")
    assert time.process_time() - start < 5
    page = (tmp_path / "long.html").read_text()
    assert len(page.encode()) < 5 * 2**20
    assert page.count('<section id="update-') == MOST_UPDATES
    assert "Close up" in page


def test_a_thinned_line_keeps_its_extremes() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    values[[12_345, 70_001, 90_000]] = 50, -50, np.inf
    chosen = thinned(values)
    assert {12_345, 70_001, 90_000, 0, 99_999} <= set(chosen)
    assert len(chosen) <= 2 * MOST_POINTS
    assert (np.diff(chosen) > 0).all()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.000123456, "0.0001235"), (1234567.0, "1.23e6"), (12345.6, "12,346"), (-1.5, "−1.5"), (1e-34, "1e−34"),
        (float("inf"), "∞"), (float("nan"), "–"), (None, "–"), (7, "7"), (True, "yes"), ("<x>", "<x>"), (56.0, "56"),
    ],
)  # fmt: skip
def test_numbers_as_a_reader_sees_them(value: object, text: str) -> None:
    assert figure(value) == text
