"""The plan of the house: who may import whom, and what nobody may."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lcogeom"
MAY_IMPORT = {
    "geometry": set(),
    "runs": set(),
    "models": set(),
    "objectives": {"geometry"},
    "curvature": {"objectives", "geometry"},
    "recording": {"curvature", "objectives", "geometry", "runs"},
    "audit": {"objectives", "geometry", "runs"},
    "plots": {"runs"},
    "diagnosis": {"runs"},
    "training": {"recording", "objectives", "geometry", "runs", "models"},
    "integrations": {"training", "recording", "objectives", "runs"},
}


def imports(file: Path) -> set[str]:
    """Rooms of lcogeom that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("lcogeom.")}
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_no_arrow_runs_upwards(room: str) -> None:
    files = list((PACKAGE / room).rglob("*.py"))
    assert files
    for file in files:
        assert imports(file) <= MAY_IMPORT[room] | {room}, file.name


def test_every_room_is_on_the_plan() -> None:
    assert {folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists()} == set(MAY_IMPORT)


def test_studies_and_figures_use_public_names() -> None:
    for file in [*(ROOT / "analysis").rglob("*.py"), *(ROOT / "figures").rglob("*.py")]:
        assert imports(file) <= {"plots", "training", "models", "integrations"}, file.name


def test_no_pickle_and_no_remote_code() -> None:
    forbidden = re.compile(r"\bpickle\b|torch\.load\(|trust_remote_code\s*=\s*True|allow_pickle")
    for file in PACKAGE.rglob("*.py"):
        code = "\n".join(line.split("#")[0] for line in file.read_text().splitlines())
        code = re.sub(r'"""[\s\S]*?"""', "", code)
        assert not forbidden.search(code), file.name
