"""From a run folder to findings in words."""

from lcogeom.diagnosis.causes import CAUSES, Cause
from lcogeom.diagnosis.compare import compare
from lcogeom.diagnosis.comparison import Compared, Comparison
from lcogeom.diagnosis.diagnose import diagnose
from lcogeom.diagnosis.finding import HEALTHY, Evidence, Finding, Missing, Report

__all__ = [
    "CAUSES",
    "HEALTHY",
    "Cause",
    "Compared",
    "Comparison",
    "Evidence",
    "Finding",
    "Missing",
    "Report",
    "compare",
    "diagnose",
]
