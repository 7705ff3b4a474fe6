"""Aggregation rules, which combine the vectors of m workers into one that f Byzantine workers can't control.

Every rule is called as ``rule(vectors, num_byzantine=f)`` on an [m, d] tensor. Meta-aggregators take a ``base`` rule
and nest freely: ``CTMA(base=NNM(base=GeometricMedian()))``.
"""

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.aggregators.arc import ARC
from lightning_byzantine.aggregators.bucketing import Bucketing
from lightning_byzantine.aggregators.bulyan import Bulyan
from lightning_byzantine.aggregators.caf import CAF
from lightning_byzantine.aggregators.centered_clipping import CenteredClipping
from lightning_byzantine.aggregators.clipping import Clipping
from lightning_byzantine.aggregators.comparative_gradient_elimination import ComparativeGradientElimination
from lightning_byzantine.aggregators.coordinate_wise_median import CoordinateWiseMedian
from lightning_byzantine.aggregators.coordinate_wise_trimmed_mean import CoordinateWiseTrimmedMean
from lightning_byzantine.aggregators.ctma import CTMA
from lightning_byzantine.aggregators.geometric_median import GeometricMedian
from lightning_byzantine.aggregators.krum import Krum
from lightning_byzantine.aggregators.mea_med import MeaMed
from lightning_byzantine.aggregators.mean import Mean
from lightning_byzantine.aggregators.meta_aggregator import MetaAggregator
from lightning_byzantine.aggregators.minimum_diameter_averaging import MinimumDiameterAveraging
from lightning_byzantine.aggregators.monna import MoNNA
from lightning_byzantine.aggregators.multi_krum import MultiKrum
from lightning_byzantine.aggregators.nnm import NNM
from lightning_byzantine.aggregators.per_layer import PerLayer
from lightning_byzantine.aggregators.persistent_filter import PersistentFilter
from lightning_byzantine.aggregators.report import Report
from lightning_byzantine.aggregators.smea import SMEA

__all__ = [
    "ARC",
    "CAF",
    "CTMA",
    "NNM",
    "SMEA",
    "Aggregator",
    "Bucketing",
    "Bulyan",
    "CenteredClipping",
    "Clipping",
    "ComparativeGradientElimination",
    "CoordinateWiseMedian",
    "CoordinateWiseTrimmedMean",
    "GeometricMedian",
    "Krum",
    "MeaMed",
    "Mean",
    "MetaAggregator",
    "MinimumDiameterAveraging",
    "MoNNA",
    "MultiKrum",
    "PerLayer",
    "PersistentFilter",
    "Report",
]
