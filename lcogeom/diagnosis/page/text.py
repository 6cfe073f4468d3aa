"""Text and numbers as the page shows them. Everything that came out of a run passes through here."""

from __future__ import annotations

import html
import math
import unicodedata

import numpy as np
import pandas as pd

SHOWN = {"\n": "↵", "\t": "⇥"}


def escaped(text: object) -> str:
    """Text safe between tags and inside double quotes, whatever it holds."""
    return html.escape(visible(str(text)), quote=True)


def visible(text: str) -> str:
    """Line feeds and tabs as signs; other control characters as their code.

    A character that turns the direction of writing, or half a surrogate pair, could otherwise rearrange the page or
    make it unreadable as UTF-8. Joiners and variation selectors are part of ordinary writing and stay.
    """
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character in SHOWN:
        return SHOWN[character]
    kind = unicodedata.category(character)
    if kind in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(character) in (
        *("LRE", "RLE", "LRO", "RLO", "PDF"),
        *("LRI", "RLI", "FSI", "PDI"),
    ):
        return f"\\u{ord(character):04x}"
    return character


def figure(value: object) -> str:
    """A number to four digits, as a reader compares it; text as it is."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if not isinstance(value, (int, float, np.integer, np.floating)):
        return str(value)
    number = float(value)
    if math.isinf(number):
        return "∞" if number > 0 else "−∞"
    if number == 0:
        return "0"
    size = abs(number)
    plain = f"{number:,.0f}" if number.is_integer() and size < 1e6 else f"{number:.4g}"
    if 1e4 <= size < 1e6:
        plain = f"{number:,.0f}"
    if "e" in plain:
        digits, _, power = f"{number:.3g}".partition("e")
        plain = f"{digits}e{int(power)}"
    return plain.replace("-", "−")


def percent(share: object) -> str:
    """A share as per cent; a tiny one is not rounded to nothing."""
    if share is None or share is pd.NA or math.isnan(float(share)):  # type: ignore[arg-type]
        return "–"
    value = 100 * float(share)  # type: ignore[arg-type]
    if value == 0:
        return "0 %"
    return f"{value:.0f} %" if value >= 10 else f"{value:.1f} %" if value >= 0.1 else "< 0.1 %"


def numbers(frame: pd.DataFrame, name: str) -> np.ndarray:
    """A column as float64 (N,); NaN where it has no number, or where there is no such column."""
    if name not in frame.columns:
        return np.full(len(frame), np.nan)
    return pd.to_numeric(frame[name], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
