"""The matrix of all workers' vectors, m rows x d columns, which aggregation rules and attacks work on."""

from lightning_byzantine.matrix.points import Combination, Coordinatewise, Measurement, Point
from lightning_byzantine.matrix.segmented import Segmented
from lightning_byzantine.matrix.segments import Names, Segments
from lightning_byzantine.matrix.ties import mean_of, nearest
from lightning_byzantine.matrix.worker_matrix import WorkerMatrix

__all__ = [
    "Combination",
    "Coordinatewise",
    "Measurement",
    "Names",
    "Point",
    "Segmented",
    "Segments",
    "WorkerMatrix",
    "mean_of",
    "nearest",
]
