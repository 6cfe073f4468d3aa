"""The faults: each a real mistake at one place of a real loop, with the cause it stands for and when it shows.

A way is one kind of mistake. Ways come in series: the newest is held out, and was made without a look at the rules;
those before it are what the rules were tuned on.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from library_loops import OURS, TRLS
from plain_loop import Alter, Setup

RL = ("grpo", "ppo", "lco-kld", "reinforce")
RATIO = ("grpo", "ppo")
ALL = (*RL, "sft")


SERIES = {"first": 0, "second": 5000, "third": 9000, "fourth": 13000, "fifth": 17000}
"""In the order in which they were made, each with what its seeds begin at."""


def half_of(series: str) -> str:
    """`tuning`, or `held-out`: the newest series."""
    return "held-out" if series == list(SERIES)[-1] else "tuning"


@dataclass(frozen=True, eq=False)
class Way:
    """One way to make one cause."""

    cause: str
    name: str
    series: str
    """Which of SERIES it came with."""
    says: str
    """What went wrong, in words."""
    make: Any
    """(size) -> place -> what happens there."""
    mild: float
    severe: float
    """Sizes handed to `make`."""
    objectives: tuple[str, ...] = ALL
    seen: tuple[int, int] = (0, 0)
    """First and last update, counted from the fault's, that a careful reader may name as the first one concerned. They
    differ where the effect grows gradually."""
    until: tuple[str, float] | None = None
    """(column, bound): where the effect grows gradually, the last update that may be named is the first at which the
    column is past the bound, of `entropy` relative to its mean over the first five updates."""
    always: bool = False
    """Whether it is there from update 0 on in every run."""
    setup: Mapping[str, object] | Callable[[float], Mapping[str, object]] = field(default_factory=dict)
    """Settings of the loop that the fault needs, or (size) -> these."""
    from_start: bool = False
    """Whether it also shows where the fault is there from update 0 on."""
    rollout: bool = False
    """Whether it acts when a rollout is made."""
    plain: bool = False
    """Whether only the plain loop has what it needs."""
    also: tuple[str, ...] = ()
    """Other causes that are a right answer, too: the fault is both."""


WAYS: list[Way] = []


def way(cause: str, name: str, series: str, says: str, *sizes: float, **options: Any) -> Any:
    """Put the function below into the list: (size) -> place -> what happens there. sizes: mild, severe."""

    def add(make: Any) -> Any:
        WAYS.append(Way(cause, name, series, says, make, *sizes, **options))
        return make

    return add


def once(alter: Alter) -> Alter:
    """Only at the fault's first update."""
    return lambda value, now: alter(value, now) if now.since == 0 else value


@dataclass(frozen=True, eq=False)
class Case:
    """One run of the bench."""

    name: str
    half: str
    seed: int
    setup: Setup
    way: Way | None = None
    """None: a healthy run."""
    size: float = 0.0
    severe: bool = False
    first: int = 0
    """The update at which the fault begins."""
    loop: str = "plain"
    """`plain`, `ours` (lcogeom.training) or `trl`."""

    def record(self) -> dict[str, object]:
        """What fault.json says."""
        way = self.way
        return {
            "cause": "healthy" if way is None else way.cause,
            "way": None if way is None else way.name,
            "says": None if way is None else way.says,
            "update": None if way is None else self.first,
            "seen": None if way is None else [self.first + way.seen[0], self.first + way.seen[1]],
            "also": [] if way is None else list(way.also),
            "size": self.size,
            "severe": self.severe,
            "half": self.half,
            "seed": self.seed,
            "loop": self.loop,
            "setup": asdict(self.setup),
        }


EARLY, LATE = (6, 8), (18, 20)
BY_OBJECTIVE = {"sft": {"learning_rate": 2e-4}, "reinforce": {"inner_epochs": 1}}


def faulty_cases() -> list[Case]:
    """Four of each way: mild and severe, early (or from the start) and late; models and objectives take turns."""
    cases, seeds = [], {series: start + 100 for series, start in SERIES.items()}
    for turn, one in enumerate(ways()):
        for place in range(4):
            severe, late = place in (1, 2), place in (1, 3)
            objective = one.objectives[(turn + place) % len(one.objectives)]
            size = one.severe if severe else one.mild
            given = dict(one.setup(size) if callable(one.setup) else one.setup)
            setup = Setup(
                model=("tiny", "gpt2")[(turn + place + place // 2) % 2],
                **{"objective": objective, **BY_OBJECTIVE.get(objective, {}), **given},
            )
            first = (LATE if late else EARLY)[(turn + place // 2) % 2]
            if one.rollout:
                first = -(-first // setup.inner_epochs) * setup.inner_epochs
            if one.from_start and place in (0, 2) and (turn + place // 2) % 2:
                first = 0
            if one.always or one.make(size) == {}:
                first = 0
            seeds[one.series] += 1
            name = f"{one.cause}/{one.name}/{place}"
            cases.append(Case(name, half_of(one.series), seeds[one.series], setup, one, size, severe, first))
        for loop, known in (("ours", OURS), ("trl", TRLS)):
            if (case := in_library(one, turn, loop, known)) is not None:
                cases.append(case)
    return cases


KEPT = {"learning_rate", "warmup", "inner_epochs", "updates", "options"}
OBJECTIVES = {"ours": ("grpo", "sft", "lco-kld", "ppo", "reinforce"), "trl": ("sft", "grpo")}


def in_library(one: Way, turn: int, loop: str, known: frozenset[str]) -> Case | None:
    """The severe fault in a library's trainer, half of the time late; None where it has no place there."""
    given = dict(one.setup(one.severe) if callable(one.setup) else one.setup)
    places = one.make(one.severe).keys()
    objectives = [name for name in OBJECTIVES[loop] if name in one.objectives]
    if one.plain or not objectives or not places <= known or not places or not given.keys() <= KEPT:
        return None
    if loop == "trl" and "options" in given:
        return None
    if one.cause == "non-finite" and not one.rollout:
        objectives = [name for name in objectives if name != "reinforce"]  # whose rollouts give one update
    objective = objectives[turn % len(objectives)]
    setup = Setup(
        model=("tiny", "gpt2")[(turn // 2) % 2],
        **{"objective": objective, **BY_OBJECTIVE.get(objective, {}), "updates": 24, **given},
    )
    first = (EARLY if turn % 2 else LATE)[turn // 2 % 2]
    if one.rollout:
        first = -(-first // setup.inner_epochs) * setup.inner_epochs
    if one.always:
        first = 0
    if one.cause == "non-finite" and not one.rollout:
        first += 1  # in the middle of a rollout: sampling with such weights would end the run before it is recorded
    seed = {"ours": 300, "trl": 400}[loop] + turn + SERIES[one.series]
    return Case(f"{one.cause}/{one.name}/{loop}", half_of(one.series), seed, setup, one, one.severe, True, first, loop)


HEALTHY: tuple[dict[str, object], ...] = (
    {},
    {"inner_epochs": 1},
    {"inner_epochs": 4, "learning_rate": 5e-5},
    {"warmup": 8, "schedule": "linear"},
    {"clip_norm": None},
    {"reduction": "sequence"},
    {"accumulation": 4},
    {"weight_decay": 0.1, "tap": "hidden"},
    {"learning_rate": 3e-5},
    {"task": "addition-1"},
)


def healthy_cases() -> list[Case]:
    """Every objective with every kind of settings, on the seeds of both oldest series; then the later series' own."""
    cases = []
    for series in ("first", "second"):
        turn, half = 0, half_of(series)
        start, place = SERIES[series] + 500, 10 * (series == "second")
        for objective in ("grpo", "ppo", "lco-kld", "lco-mse", "reinforce", "sft"):
            for kind in HEALTHY:
                turn += 1
                setup = Setup(
                    model=("tiny", "gpt2")[(turn + (series == "first") + turn // 10) % 2],
                    **{"objective": objective, **BY_OBJECTIVE.get(objective, {}), **kind},
                )
                name = f"healthy/{objective}-{'-'.join(map(str, kind)) or 'plain'}/{turn % 10 + place}"
                cases.append(Case(name, half, start + turn, setup))
        for loop, objectives in OBJECTIVES.items():
            for objective in objectives:
                turn += 1
                setup = Setup(
                    model=("tiny", "gpt2")[turn % 2],
                    **{"objective": objective, **BY_OBJECTIVE.get(objective, {}), "updates": 24},
                )
                cases.append(Case(f"healthy/{objective}-{loop}/{place}", half, start + turn, setup, loop=loop))
    later = (("third", 500, 19), ("fourth", 600, 199), ("fifth", 600, 399))
    return [*cases, *(case for series, after, place in later for case in healthy_of(series, after=after, place=place))]


def healthy_of(series: str, *, after: int, place: int) -> list[Case]:
    """A later series' healthy runs: settings that people use, of which none is in HEALTHY or an earlier series.

    Args:
        after: the seeds begin there, counted from the series' own first.
        place: numbers in the names begin there.
    """
    listed, cases, turn = importlib.import_module(f"{series}_healthy"), [], 0
    for turn, (objective, kind) in enumerate(listed.kinds(), start=1):
        setup = Setup(
            model=("tiny", "gpt2")[(turn + turn // 20) % 2],
            **{"objective": objective, **BY_OBJECTIVE.get(objective, {}), **kind},
        )
        name = f"healthy/{objective}-{'-'.join(kind) or 'plain'}/{place + turn}"
        cases.append(Case(name, half_of(series), SERIES[series] + after + turn, setup))
    for loop, objectives in OBJECTIVES.items():
        for objective in objectives:
            for kind in listed.IN_LIBRARIES:
                turn += 1
                setup = Setup(
                    model=("tiny", "gpt2")[turn % 2],
                    **{"objective": objective, **BY_OBJECTIVE.get(objective, {}), "updates": 24, **kind},
                )
                name = f"healthy/{objective}-{loop}/{place + turn}"
                cases.append(Case(name, half_of(series), SERIES[series] + after + turn, setup, loop=loop))
    return cases


def ways() -> list[Way]:
    """Every way, series by series: a way's place in the list gives its runs their models and objectives."""
    for start in ("faults_of", "third", "fourth", "fifth"):
        for kind in ("batches", "losses", "steps"):
            importlib.import_module(f"{start}_{kind}")
    return WAYS
