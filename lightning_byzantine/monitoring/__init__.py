"""Detection of faulty workers: scores, evidence, and how both are shown."""

from lightning_byzantine.monitoring.evidence import Evidence
from lightning_byzantine.monitoring.heat_map import HeatMap, heat_map
from lightning_byzantine.monitoring.scalars import worker_scalars
from lightning_byzantine.monitoring.suspect import Suspect
from lightning_byzantine.monitoring.suspect_log import SuspectLog
from lightning_byzantine.monitoring.suspicion import Suspicion
from lightning_byzantine.monitoring.worker_table import worker_table

__all__ = ["Evidence", "HeatMap", "Suspect", "SuspectLog", "Suspicion", "heat_map", "worker_scalars", "worker_table"]
