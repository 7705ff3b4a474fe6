"""Who is faulty: from the reports on all workers to suspects with evidence."""

from lightning_byzantine.monitoring.evidence import Evidence, Suspect
from lightning_byzantine.monitoring.heat_map import heat_map
from lightning_byzantine.monitoring.suspicion import Suspicion

__all__ = ["Evidence", "Suspect", "Suspicion", "heat_map"]
