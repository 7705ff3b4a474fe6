import oracles
from cases import Exempt, RuleCase
from exemptions import ABOUT_ZERO, ITERATIVE, MIXED_TIES, OWN_UNITS

from lightning_byzantine.aggregators import (
    ARC,
    CAF,
    CTMA,
    NNM,
    Bulyan,
    CoordinateWiseTrimmedMean,
    GeometricMedian,
    Krum,
)

RFA = GeometricMedian(max_iterations=3, tolerance=0, smoothing=0.1, init="zero")
CASES = [
    RuleCase(NNM(RFA), oracles.nnm(oracles.rfa), [ITERATIVE, OWN_UNITS], name="NNM(RFA)"),
    RuleCase(NNM(CoordinateWiseTrimmedMean()), oracles.nnm(oracles.coordinate_wise_trimmed_mean)),
    RuleCase(
        NNM(NNM(Krum())),
        oracles.nnm(oracles.nnm(oracles.krum)),
        [
            MIXED_TIES,
            Exempt(
                ["permutation"],
                because="mixed rows coincide: two different ones of them may be equally good, and ties go by index",
                where=lambda m, f: m - f <= 4,
            ),
        ],
    ),
    RuleCase(
        NNM(CTMA(GeometricMedian())),
        oracles.nnm(oracles.ctma(oracles.geometric_median)),
        [
            ITERATIVE,
            Exempt(["permutation"], because="mixed rows coincide, and ties go by index"),
        ],
    ),
    RuleCase(NNM(ARC(CAF())), oracles.nnm(oracles.arc(oracles.caf)), [ITERATIVE, ABOUT_ZERO]),
    RuleCase(
        NNM(Bulyan()),
        oracles.nnm(oracles.bulyan),
        [
            MIXED_TIES,
            Exempt(["permutation"], because="it leaves few rows to Krum, and ties go by index"),
            Exempt(
                ["translation"],
                because="which values are as far from their median, but for rounding, changes with a move",
            ),
        ],
    ),
]
