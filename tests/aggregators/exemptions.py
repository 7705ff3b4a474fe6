"""Reasons for which several rules don't have a property."""

from cases import Exempt

TIE_OF_TWO = Exempt(
    ["permutation"],
    because="two rows are equally near to each other: a tie, which the lower index wins",
    where=lambda m, f: m - f <= 2,
)
MIXED_TIES = Exempt(
    ["ties"], because="averages of rows tie but for rounding in the oracle; test_exact_choices.py has one of fractions"
)
ITERATIVE = Exempt(["cuts"], because="it iterates on sums over all columns, whose last digits depend on the cuts")
OWN_UNITS = Exempt(["translation", "scaling"], because="it has a length in the units of the rows, measured from 0")
SHORTENS = Exempt(["agreement"], because="a row may be longer than what it is clipped to")
ABOUT_ZERO = Exempt(["translation"], because="the norms of the rows decide")
