"""Detection of faulty workers: scores, evidence, and how both are shown."""

from lightning_byzantine.monitoring.suspect import Suspect

__all__ = ["Suspect"]
