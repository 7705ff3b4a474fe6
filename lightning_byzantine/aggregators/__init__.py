"""Aggregation rules: from the m vectors of all workers to one that f Byzantine workers can't decide.

Every rule is called as ``rule(vectors, num_byzantine=f)`` on an [m, d] tensor. Meta-aggregators take a ``base`` rule
and nest freely: ``CTMA(base=NNM(base=CoordinateWiseMedian()))``.
"""

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.aggregators.bucketing import Bucketing
from lightning_byzantine.aggregators.coordinate_wise_median import CoordinateWiseMedian
from lightning_byzantine.aggregators.coordinate_wise_trimmed_mean import CoordinateWiseTrimmedMean
from lightning_byzantine.aggregators.ctma import CTMA
from lightning_byzantine.aggregators.geometric_median import GeometricMedian
from lightning_byzantine.aggregators.krum import Krum
from lightning_byzantine.aggregators.mean import Mean
from lightning_byzantine.aggregators.meta_aggregator import MetaAggregator
from lightning_byzantine.aggregators.multi_krum import MultiKrum
from lightning_byzantine.aggregators.nnm import NNM

__all__ = [
    "CTMA",
    "NNM",
    "Aggregator",
    "Bucketing",
    "CoordinateWiseMedian",
    "CoordinateWiseTrimmedMean",
    "GeometricMedian",
    "Krum",
    "Mean",
    "MetaAggregator",
    "MultiKrum",
]
