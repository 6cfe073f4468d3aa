"""run.json: what a run folder is, checked, and found again in its parts when it is damaged."""

from __future__ import annotations

import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lcogeom.runs.parts import newest_note

SCHEMA_VERSION = 2
"""1: parts without checks. 2: parts with ranges and checks in their names, superseding earlier ones."""
RUN, COLLECTION = "run", "collection"
FILE = "run.json"


class NewerSchema(ValueError):
    """Written by a later version of lcogeom."""


def create_folder(path: str | Path, meta: Mapping[str, object], *, kind: str = RUN) -> Path:
    """Make a new run folder (or a collection, which holds run folders), complete from its first moment.

    Raises:
        FileExistsError: the path is taken. Nothing in it is touched.
        OSError: the disk does not take it.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"run: {str(path)!r} exists already. Give another folder, or remove it first.")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        record = complete_meta(meta, kind)
        text = json.dumps(record | {"check": _check(record)}, indent=2)
        (unfinished / FILE).write_text(text + "\n", encoding="utf-8")
        unfinished.chmod(0o755)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    try:
        unfinished.rename(path)
    except OSError as error:
        shutil.rmtree(unfinished)
        raise FileExistsError(f"run: {str(path)!r} was made by someone else just now. Give another folder.") from error
    return path


def complete_meta(meta: Mapping[str, object], kind: str = RUN) -> dict[str, object]:
    """What run.json holds of a writer's own `meta`, as it comes back from json."""
    record = {"schema": SCHEMA_VERSION, "kind": kind, "lcogeom": version("lcogeom"), **meta}
    return json.loads(json.dumps(record))


def read_meta(path: Path, damaged: list[str]) -> dict[str, Any]:
    """The content of run.json. Damaged or gone, it is taken from the newest part that keeps a copy.

    Args:
        damaged: gains a line where that was necessary.

    Raises:
        FileNotFoundError: not a run folder.
        NewerSchema: this version cannot read it.
        ValueError: damaged, and no part keeps a copy.
    """
    file = path / FILE
    try:
        meta = _parse(file.read_bytes())
    except (OSError, ValueError) as error:
        meta = _copy(path, error)
        damaged.append(
            f"{path.name}/{FILE}: {error}; read from {'its runs' if meta['kind'] == COLLECTION else 'parts'}"
        )
    if meta["schema"] > SCHEMA_VERSION:
        raise NewerSchema(
            f"run: {str(path)!r} has schema {meta['schema']}; this version reads up to {SCHEMA_VERSION}. Upgrade."
        )
    return meta


def members(path: Path, meta: Mapping[str, object], damaged: list[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The run folders of a collection with their labels; a run is its own only member.

    Args:
        damaged: gains a line for each whose run.json is damaged; those without a copy of it are left out.
    """
    if meta["kind"] != COLLECTION:
        yield path, _labels(meta)
        return
    for folder in sorted(found.parent for found in path.rglob(FILE) if found.parent != path):
        if folder.relative_to(path).parts[0].startswith("."):
            continue
        try:
            labels = _labels(read_meta(folder, damaged))
        except NewerSchema:
            raise
        except ValueError as error:
            damaged.append(f"{folder.relative_to(path.parent)}: {error}; left out")
        else:
            yield folder, labels


def _parse(content: bytes) -> dict[str, Any]:
    try:
        meta = json.loads(content)
        check = meta.pop("check", None)  # schema 1 has none; nor has a file that someone edited and took it out of
        meta["schema"] = int(meta["schema"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"damaged ({error})") from None
    if check is not None and check != _check(meta):
        raise ValueError("damaged (it does not match its check; after editing it on purpose, take 'check' out)")
    return meta


def _check(meta: Mapping[str, object]) -> str:
    """CRC-32 of the content, whatever its layout."""
    return f"{zlib.crc32(json.dumps(meta, sort_keys=True).encode()):08x}"


def _copy(path: Path, error: Exception) -> dict[str, Any]:
    if (kept := newest_note(path)) is not None:
        return kept
    file = path / FILE
    if not file.is_file():
        raise FileNotFoundError(f"run: {str(path)!r} is not a run folder (it holds no run.json).") from error
    if not (path / "updates").is_dir() and any(found.parent != path for found in path.rglob(FILE)):
        return {"schema": SCHEMA_VERSION, "kind": COLLECTION}
    raise ValueError(f"run: {str(file)!r} is {error}, and no part keeps a copy of it.") from error


def _labels(meta: Mapping[str, Any]) -> dict[str, Any]:
    return dict(meta.get("labels") or {})
