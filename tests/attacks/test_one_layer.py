import attack_oracles
import pytest
import torch
from cases import AttackCase
from shards import in_shards
from torch import Tensor
from vectors import as_list, rows

from lightning_byzantine.attacks import OneLayer
from lightning_byzantine.matrix import Segments, WorkerMatrix

CASES = [
    AttackCase(
        OneLayer(),
        lambda honest, own: [attack_oracles.one_layer(honest, range(40), budget=1.4)] * len(own),
    ),
    AttackCase(
        OneLayer(budget=3.0, num_classes=7),
        lambda honest, own: [attack_oracles.one_layer(honest, range(5), budget=3.0)] * len(own),
        name="OneLayer, towards a class",
    ),
]

# As DDP might order them: the last parameter comes first, in another block than the others.
PARAMETERS = {"1.weight": 200, "1.bias": 30, "3.weight": 120, "3.bias": 10}
BLOCKS = [("3.weight", "3.bias"), ("1.bias", "1.weight")]
WIDTH = sum(PARAMETERS.values())


def sizes(names: tuple[str, ...]) -> list[int]:
    return [PARAMETERS[name] for name in names]


def named_matrix(vectors: Tensor) -> WorkerMatrix:
    """Return a matrix of blocks with names, of [m, 360] vectors."""
    segments = Segments.of_blocks(PARAMETERS, [(names, sizes(names)) for names in BLOCKS])
    return WorkerMatrix(vectors.split([sum(sizes(names)) for names in BLOCKS], dim=1), segments=segments)


@pytest.mark.parametrize(
    ("attack", "columns"),
    [
        (OneLayer(), range(120)),
        (OneLayer(num_classes=10), range(12)),
        (OneLayer(layer="3.weight", num_classes=7), range(17)),
        (OneLayer(layer="3.bias"), range(120, 130)),
        (OneLayer(layer="1.bias", num_classes=2), range(130, 145)),
        (OneLayer(layer="1.weight", num_classes=2), range(160, 260)),
    ],
    ids=str,
)
def test_all_of_the_deviation_is_in_one_parameter(attack: OneLayer, columns: range) -> None:
    vectors = rows(7, WIDTH).double()
    forged = torch.cat(attack.tamper(named_matrix(vectors), [0, 4]).blocks, dim=1)
    expected = attack_oracles.one_layer(as_list(vectors[[1, 2, 3, 5, 6]]), columns, budget=1.4)
    torch.testing.assert_close(forged[0], torch.from_numpy(expected))
    assert torch.equal(forged[4], forged[0])
    assert torch.equal(forged[[1, 2, 3, 5, 6]], vectors[[1, 2, 3, 5, 6]])


@pytest.mark.parametrize("num_classes", [None, 3])
def test_a_parameter_may_be_on_several_ranks(num_classes: int | None) -> None:
    vectors, width = rows(7, WIDTH), WIDTH // 6
    whole = OneLayer("1.weight", num_classes=num_classes).tamper(named_matrix(vectors), [1, 2])
    segments = Segments.of_blocks(PARAMETERS, [(tuple(PARAMETERS), list(PARAMETERS.values()))])
    in_order = torch.cat([vectors[:, 160:], vectors[:, 130:160], vectors[:, :130]], dim=1)

    def attacked(shard: WorkerMatrix) -> Tensor:
        own = shard.with_segments(segments.shard(shard.shard, [width]))
        return OneLayer("1.weight", num_classes=num_classes).tamper(own, [1, 2]).blocks[0]

    shards = torch.cat(in_shards(attacked, list(in_order.split(width, dim=1))), dim=1)
    torch.testing.assert_close(shards[:, :200], whole.blocks[1][:, 30:])


def test_honest_rows_are_not_nearer_to_the_mean_nor_to_each_other() -> None:
    vectors = rows(9, WIDTH)
    forged = torch.cat(OneLayer().tamper(named_matrix(vectors), [7, 8]).blocks, dim=1)
    honest = forged[:7]
    among_honest = (honest[:, None] - honest).norm(dim=2)
    assert (forged[8] - honest).norm(dim=1).max() < 1.5 * among_honest.max()
    in_the_layer = (honest[:, :120] - honest[:, :120].mean(0)).norm(dim=1)
    assert (forged[8] - honest.mean(0))[:120].norm() > 2 * in_the_layer.max()


def test_the_mean_is_sent_where_the_layer_has_no_spread() -> None:
    vectors = rows(7, WIDTH)
    vectors[:, :120] = 3.0
    forged = torch.cat(OneLayer().tamper(named_matrix(vectors), [0]).blocks, dim=1)
    torch.testing.assert_close(forged[0], vectors[1:].mean(0))
    # Nobody has used the layer in this step.
    unused = Segments.of_blocks(PARAMETERS, [((None, "3.bias"), [120, 10]), (BLOCKS[1], sizes(BLOCKS[1]))])
    forged = torch.cat(OneLayer().tamper(named_matrix(vectors).with_segments(unused), [0]).blocks, dim=1)
    torch.testing.assert_close(forged[0], vectors[1:].mean(0))


def test_a_model_without_large_layers_is_attacked_as_a_whole() -> None:
    vectors = rows()
    small = WorkerMatrix([vectors], segments=Segments.of_sizes([30, 10]))
    torch.testing.assert_close(OneLayer().tamper(small, [0]).blocks[0], OneLayer()(vectors, [0]))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"layer must be one of 1.weight, 1.bias, 3.weight, 3.bias, got '3.wieght'"):
        OneLayer(layer="3.wieght").tamper(named_matrix(rows(7, WIDTH)), [0])
    with pytest.raises(ValueError, match="layer must be None for a matrix without names of parameters, got 'weight'"):
        OneLayer(layer="weight")(rows(), [0])
    with pytest.raises(TypeError, match="layer must be the name of a parameter, got 3"):
        OneLayer(layer=3)
    with pytest.raises(ValueError, match="budget must be finite and at least 0, got -1"):
        OneLayer(budget=-1)
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        OneLayer(num_classes=1)
