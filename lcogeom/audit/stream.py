"""The audit: an objective's convexity at every logged token, from log-probabilities alone (method.md, 2.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from lcogeom.audit.cells import Tokens, explode
from lcogeom.audit.columns import NUMBERS, Plan, plan_columns
from lcogeom.audit.formats import open_source
from lcogeom.audit.report import AuditReport, WorstToken, group_of
from lcogeom.audit.tally import Tally, Worst
from lcogeom.geometry.convexity import convexity_margins, forward_kl_needed, odds_against
from lcogeom.objectives import ActionObjective, TokenBatch, objective_names
from lcogeom.objectives import objective as build

LISTED_BROKEN = 1000
GROUPS = ("all", "positive", "negative", "zero")


def audit_file(
    path: str | Path,
    objective: str | ActionObjective = "ppo",
    *,
    options: Mapping[str, object] | None = None,
    columns: Mapping[str, str] | None = None,
    skip_broken: bool = False,
    worst: int = 10,
    progress: Callable[[float], None] | None = None,
) -> AuditReport:
    """Audit logged log-probabilities, without the model, in memory that does not grow with the file.

    Args:
        path: parquet, CSV (.csv, .tsv) or JSON lines (.jsonl): a row per token, or a row per sequence whose cells are
            lists (in CSV: JSON lists). One advantage for a whole list belongs to each of its tokens. A number written
            as text is read as that number.
        objective: a name of the registry, or an `ActionObjective`, which is given every column the file has.
        options: of the named objective, such as {"clip_high": 0.28}.
        columns: role -> column where the file's names are not among the accepted ones. Roles: logprobs, old_logprobs,
            ref_logprobs, advantages, mask, sequence, position, token_id, text.
        skip_broken: leave broken rows out and list them; otherwise the first one is an error.
        worst: how many of the worst tokens to keep.
        progress: called with the share of the file that was read, in [0, 1].

    Raises:
        ValueError: an objective that log-probabilities do not determine, a column missing, a broken row, no token.
        TypeError: an option that the objective does not have.
        OSError: the file cannot be read.
    """
    path = Path(path)
    chosen = _auditable(objective, options or {})
    needs = chosen.needs if isinstance(objective, str) else None
    try:
        return _audit(
            path,
            chosen,
            needs=needs,
            given=columns or {},
            skip_broken=skip_broken,
            limit=worst,
            progress=progress or (lambda share: None),
        )
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


def _audit(
    path: Path,
    objective: ActionObjective,
    *,
    needs: tuple[str, ...] | None,
    given: Mapping[str, str],
    skip_broken: bool,
    limit: int,
    progress: Callable[[float], None],
) -> AuditReport:
    source = open_source(path)
    plan = plan_columns(source.columns, needs, given=given, objective=objective.name)
    tallies = {group: Tally() for group in GROUPS}
    worst = Worst(limit)
    rows = masked = clamped = broken = 0
    listed: list[tuple[int, str]] = []
    for chunk in source.chunks(plan.wanted()):
        tokens = explode(chunk, plan)
        rows += len(chunk.numbers) + len(chunk.broken)
        masked, clamped, broken = masked + tokens.masked, clamped + tokens.clamped, broken + len(tokens.broken)
        listed += tokens.broken[: LISTED_BROKEN - len(listed)]
        if skip_broken or not broken:
            _add(tokens, objective, plan, tallies, worst)
        progress(chunk.done)
    if broken and not skip_broken:
        number, why = listed[0]
        others = f" {broken - 1:,} other rows are broken, too." if broken > 1 else ""
        remedy = "Mend them, or leave them out with --skip-broken (skip_broken=True)."
        raise ValueError(f"{source.unit} {number}: {why}.{others} {remedy}")
    if tallies["all"].tokens == 0:
        raise ValueError(f"no token to audit ({rows:,} rows, {masked:,} tokens masked, {broken:,} rows broken).")
    return AuditReport(
        file=str(path),
        format=source.format,
        objective=objective.name,
        options=dict(objective.options),
        columns={**plan.columns, **({"mask": " * ".join(plan.masks)} if plan.masks else {})},
        unit=source.unit,
        rows=rows,
        masked=masked,
        clamped=clamped,
        broken=broken,
        broken_rows=tuple(listed),
        groups={name: group_of(tally) for name, tally in tallies.items()},
        worst=tuple(token for _, token in worst.kept),
    )


def _auditable(objective: str | ActionObjective, options: Mapping[str, object]) -> ActionObjective:
    if not isinstance(objective, str):
        if not isinstance(objective, ActionObjective):
            raise TypeError(f"objective: {objective!r} is no ActionObjective; log-probabilities do not determine it.")
        if options:
            raise TypeError("options: they belong to a named objective; build yours with them instead.")
        return objective
    chosen = build(objective, **options)
    if isinstance(chosen, ActionObjective) and set(chosen.needs) <= set(NUMBERS):
        return chosen
    lacks = (
        f"it needs {', '.join(sorted(set(chosen.needs) - set(NUMBERS)))} beside them"
        if isinstance(chosen, ActionObjective)
        else "its loss sees more of a token's distribution than log pi(a)"
    )
    raise ValueError(
        f"objective: {objective!r} cannot be audited from log-probabilities: {lacks}. Record a run with the model at "
        f"hand (lcogeom.attach(..., objective={objective!r})), or audit one of: {', '.join(auditable_names())}."
    )


def auditable_names() -> list[str]:
    """The registered objectives whose curvature follows from log-probabilities."""
    found = []
    for name in objective_names():
        try:
            one = build(name)
        except (TypeError, ValueError):  # it has an option without a default
            continue
        if isinstance(one, ActionObjective) and set(one.needs) <= set(NUMBERS):
            found.append(name)
    return found


def _add(tokens: Tokens, objective: ActionObjective, plan: Plan, tallies: Mapping[str, Tally], worst: Worst) -> None:
    """One chunk's tokens into the sums."""
    count = len(tokens.rows)
    if count == 0:
        return
    values = tokens.values
    logprobs = torch.from_numpy(values["logprobs"])
    fields = {role: torch.from_numpy(values[role]) for role in plan.required if role != "logprobs"}
    batch = TokenBatch(actions=torch.zeros(count, dtype=torch.long), **fields)
    _, d1, d2 = objective.derivatives(logprobs, batch)
    odds = odds_against(logprobs)
    low = torch.minimum(*convexity_margins(d1, d2, odds))
    known = torch.isfinite(d1) & torch.isfinite(d2)
    kl_needed = torch.where(known, forward_kl_needed(d1, d2, odds), math.nan).numpy()
    complement = -torch.expm1(logprobs)
    own = (complement * (-d1 * logprobs.exp() + d2 * complement)).numpy()
    groups = {"all": np.ones(count, dtype=bool)}
    advantages = values.get("advantages")
    if advantages is not None:
        groups |= {"positive": advantages > 0, "negative": advantages < 0, "zero": advantages == 0}
    for name, some in groups.items():
        tallies[name].add(kl_needed[some], low.numpy()[some], own[some])

    def describe(token: int) -> WorstToken:
        logprob, old = float(values["logprobs"][token]), values.get("old_logprobs")
        row, column = int(tokens.rows[token]), plan.columns.get
        number = int(tokens.chunk.numbers[row])
        sequence = _identity(tokens.label(column("sequence"), token, whole_row=True))
        position = _identity(tokens.label(column("position"), token))
        if tokens.listed[row]:
            sequence = number if sequence is None else sequence
            position = int(tokens.places[token]) if position is None else position
        return WorstToken(
            row=number,
            sequence=sequence,
            position=position,
            token_id=_identity(tokens.label(column("token_id"), token)),
            text=tokens.label(column("text"), token),
            advantage=None if advantages is None else float(advantages[token]),
            logprob=logprob,
            prob=math.exp(logprob),
            ratio=None if old is None else float(np.exp(logprob - old[token])),
            kl_needed=float(kl_needed[token]),
            d1=float(d1[token]),
            d2=float(d2[token]),
        )

    worst.add(kl_needed, describe)


def _identity(cell: object) -> object:
    """An id or a place as it stands in the file; an integer where a CSV cell or a float column holds one."""
    if isinstance(cell, float):
        return int(cell) if cell.is_integer() else None
    if isinstance(cell, str):
        return int(cell) if cell.isascii() and cell.isdecimal() and str(int(cell)) == cell else cell or None
    return cell
