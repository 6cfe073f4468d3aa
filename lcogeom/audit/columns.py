"""Which column of a file is what: the accepted names, and what is said when one is missing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lcogeom.audit.trainers import recognise

ALIASES: dict[str, tuple[str, ...]] = {
    "logprobs": (
        *("logprobs", "logprob", "logps", "logp", "per_token_logps", "per_token_logprobs", "token_logprobs"),
        *("new_logprobs", "new_logprob", "new_logps", "new_logp", "current_logprobs", "policy_logprobs"),
    ),
    "old_logprobs": (
        *("old_logprobs", "old_logprob", "old_logps", "old_logp", "old_per_token_logps", "old_per_token_logprobs"),
        *("behaviour_logprobs", "behavior_logprobs", "rollout_logprobs", "rollout_logprob"),
        *("sampling_per_token_logps", "sampling_logprobs", "sampling_logps"),
    ),
    "ref_logprobs": (
        *("ref_logprobs", "ref_logprob", "ref_logps", "ref_logp", "ref_per_token_logps", "ref_per_token_logprobs"),
        *("reference_logprobs", "reference_logps"),
    ),
    "advantages": ("advantages", "advantage", "adv", "token_advantages", "per_token_advantages"),
    "mask": ("response_mask", "completion_mask", "action_mask", "loss_mask", "tool_mask", "mask"),
    "sequence": ("sequence", "sequence_id", "seq_id", "sample", "sample_id", "episode", "uid", "request_id"),
    "position": ("position", "token_position", "pos"),
    "token_id": ("token_id", "token_ids", "completion_ids", "responses", "response_ids", "actions", "action"),
    "text": ("token_text", "text", "token", "tokens", "token_str"),
}
"""Role -> names, the preferred one first. Case, underscores and hyphens do not matter: log_probs is logprobs."""

NUMBERS = ("logprobs", "old_logprobs", "ref_logprobs", "advantages")
"""The roles that an objective may need: fields of `TokenBatch` besides the actions."""
SHOWN_NAMES = 30


@dataclass(frozen=True)
class Plan:
    """Which columns are read, and which of them must hold a number at every token."""

    columns: Mapping[str, str]
    """Role -> column."""
    masks: tuple[str, ...]
    """Columns whose product says which tokens count."""
    required: tuple[str, ...]
    """Roles whose values the objective reads."""

    def wanted(self) -> list[str]:
        """Every column to read, once."""
        return list(dict.fromkeys([*self.columns.values(), *self.masks]))


def plan_columns(
    found: Sequence[str], needs: Iterable[str] | None, *, given: Mapping[str, str], objective: str
) -> Plan:
    """Match a file's columns to what the objective needs.

    Args:
        found: the file's columns.
        needs: roles that the objective reads beside `logprobs`, of `NUMBERS`; None: whichever the file has.
        given: role -> column, overriding the accepted names.
        objective: its name, for messages.

    Raises:
        ValueError: an unknown role or column in `given`, or no column for a role that is needed. The message names
            the columns found and the names accepted; TRL's and verl's own files are recognised.
    """
    for role, column in given.items():
        if role not in ALIASES:
            raise ValueError(f"columns: no role {role!r}. There are: {', '.join(ALIASES)}.")
        if column not in found:
            raise ValueError(f"no column {column!r} (asked for as {role}). Columns found: {shown(found)}.")
    known = {_plain(name): name for name in reversed(found)}
    matches = {role: [known[_plain(n)] for n in names if _plain(n) in known] for role, names in ALIASES.items()}
    columns = {role: given.get(role) or matches[role][0] for role in ALIASES if role in given or matches[role]}
    needed = set(columns if needs is None else needs)
    required = ("logprobs", *(role for role in NUMBERS[1:] if role in needed))
    for role in required:
        if role not in columns:
            raise ValueError(_missing(role, found, columns, objective))
    columns.pop("mask", None)
    if "ref_logprobs" not in required:  # the old log-probs and the advantages are shown even where f does not read them
        columns.pop("ref_logprobs", None)
    # A padded batch has one mask for the padding and may have another for a tool's tokens: a token needs both.
    masks = (given["mask"],) if "mask" in given else tuple(matches["mask"])
    return Plan(columns, masks, required)


def _missing(role: str, found: Sequence[str], columns: Mapping[str, str], objective: str) -> str:
    trainer = recognise(found) if not {"logprobs", "old_logprobs"} & set(columns) else None
    if trainer is not None:
        return f"no log-probabilities in this file. {trainer} Columns found: {shown(found)}."
    said = f"no column of {role}, which objective {objective!r} needs. Columns found: {shown(found)}. "
    said += f"Accepted names: {', '.join(ALIASES[role])}; or name yours with --{role.replace('_', '-')} COLUMN."
    if role == "old_logprobs":
        said += f" Where the policy had not moved since sampling, it is {columns['logprobs']!r} itself."
    if role == "logprobs" and "old_logprobs" in columns:
        said += (
            f" To audit the first update on a batch, where the policy is still the one that logged "
            f"{columns['old_logprobs']!r}, pass --logprobs {columns['old_logprobs']}."
        )
    return said


def shown(names: Sequence[str]) -> str:
    """Column names as printed: quoted where they hold control characters, and not too many."""
    listed = [name if name.isprintable() else repr(name) for name in names[:SHOWN_NAMES]]
    return ", ".join(listed) + (f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else "")


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())
