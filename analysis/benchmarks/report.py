"""Where the benchmarks put their tables, and what they say of the machine."""

from __future__ import annotations

import platform
from pathlib import Path

HERE = Path(__file__).parent


def cpu_model() -> str:
    """The processor's name, where the system tells."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def update_readme(name: str, text: str) -> None:
    """Put a benchmark's tables between its marks in analysis/README.md, if it has them."""
    first, last = f"<!-- {name}: written by the script -->", f"<!-- {name}: end -->"
    file = HERE.parent / "README.md"
    content = file.read_text()
    if first in content and last in content:
        before, rest = content.split(first)
        file.write_text(f"{before}{first}\n\n{text}\n\n{last}{rest.split(last)[1]}")
    else:
        print(f"\n{file.name}: no marks, left as it is. To have the tables there, add\n{first}\n{last}")
