"""From a run folder to findings in words."""

from lcogeom.diagnosis.finding import HEALTHY, Evidence, Finding, Missing, Report

__all__ = ["HEALTHY", "Evidence", "Finding", "Missing", "Report"]
