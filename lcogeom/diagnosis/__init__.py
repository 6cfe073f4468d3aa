"""From a run folder to findings in words."""

from lcogeom.diagnosis.compare import compare
from lcogeom.diagnosis.comparison import Compared, Comparison
from lcogeom.diagnosis.finding import HEALTHY, Evidence, Finding, Missing, Report

__all__ = ["HEALTHY", "Compared", "Comparison", "Evidence", "Finding", "Missing", "Report", "compare"]
