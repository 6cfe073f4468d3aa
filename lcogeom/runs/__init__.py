"""The run folder: what the live half writes and the reading half reads."""

from lcogeom.runs.black_box import BlackBoxEntry, NonFinite, RecordedBatch
from lcogeom.runs.columns import COLUMNS, TABLES, Column, glossary
from lcogeom.runs.folder import COLLECTION, create_folder
from lcogeom.runs.reading import Run, load_run
from lcogeom.runs.sketches import Sketches
from lcogeom.runs.store import RunWriter

__all__ = [
    "COLLECTION",
    "COLUMNS",
    "TABLES",
    "BlackBoxEntry",
    "Column",
    "NonFinite",
    "RecordedBatch",
    "Run",
    "RunWriter",
    "Sketches",
    "create_folder",
    "glossary",
    "load_run",
]
