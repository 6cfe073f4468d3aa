"""The audit of logged log-probabilities: how convex an objective was at every token, without the model."""

from lcogeom.audit.report import AuditReport
from lcogeom.audit.stream import audit_file

__all__ = ["AuditReport", "audit_file"]
