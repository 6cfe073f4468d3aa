"""From a run folder to findings in words."""

from lcogeom.diagnosis.causes import CAUSES, Cause
from lcogeom.diagnosis.diagnose import diagnose
from lcogeom.diagnosis.finding import HEALTHY, Evidence, Finding, Missing, Report

__all__ = ["CAUSES", "HEALTHY", "Cause", "Evidence", "Finding", "Missing", "Report", "diagnose"]
