import torch
from cases import AttackCase, Exempt
from vectors import rows

from lightning_byzantine.aggregators import CoordinateWiseMedian, CoordinateWiseTrimmedMean
from lightning_byzantine.attacks import Fang

CASES = [
    AttackCase(
        Fang(),
        None,
        [
            Exempt(["oracle"], because="it draws"),
            Exempt(["cuts", "shards"], because="each block and each shard has draws of its own"),
        ],
    )
]


def test_values_are_beyond_the_honest_ones_by_a_factor_of_at_most_two() -> None:
    vectors = torch.tensor(
        [[1.0, -9.0, -1.0, 5.0, 1.0], [3.0, -4.0, 6.0, -8.0, -1.0], [2.0, -2.0, 1.0, -6.0, 0.0]] + [[7.0] * 5] * 2
    ).repeat_interleave(200, dim=1)
    forged = Fang()(vectors, [3, 4])[3:].view(2, 5, 200)
    # Means are above 0, below 0, above, below and 0; from the lowest or the highest honest value away from the others.
    bounds = [(0.5, 1.0), (-2.0, -1.0), (-2.0, -1.0), (5.0, 10.0), (0.0, 0.0)]
    for column, (low, high) in enumerate(bounds):
        sent = forged[:, column]
        assert low <= sent.min() <= low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) <= sent.max() <= high
    assert not torch.equal(forged[0], forged[1]), "colluders who send the same would be too easy to tell"


def test_medians_move_against_the_mean_in_every_coordinate() -> None:
    vectors = rows(9, 500)
    mean = vectors[:5].mean(0)
    forged = Fang()(vectors, [5, 6, 7, 8])
    for rule in (CoordinateWiseMedian(), CoordinateWiseTrimmedMean()):
        assert ((rule(forged, num_byzantine=4) - mean) * mean.sign() < 0).all()


def test_draws_are_new_in_every_step() -> None:
    attack = Fang()
    assert not torch.equal(attack(rows(), [0]), attack(rows(), [0]))
    assert torch.equal(Fang(seed=4)(rows(), [0]), Fang(seed=4)(rows(), [0]))
