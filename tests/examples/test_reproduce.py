"""The grid: what its YAML may say, what survives an interruption, tables, verdicts and pictures."""

import csv
import json
import re
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reproduce
import reproduction.runner
import yaml
from fake_training import die_half_way_once, finish
from matplotlib.figure import Figure
from partitions import IID, Dirichlet
from reproduction.command import grid_parser
from reproduction.grid import Cell, Run, byzantine_workers, cells, make_run, scenario
from reproduction.pictures import curves, draw, heat_map, ranking_map
from reproduction.ranking import ranking, ranking_table, write_ranking
from reproduction.results import Comparison, compare, report, write_csv
from reproduction.runner import CellError, run_cells
from reproduction.training import RESULT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.aggregators import (
    CTMA,
    Aggregator,
    CoordinateWiseMedian,
    GeometricMedian,
    Krum,
    MetaAggregator,
)
from lightning_byzantine.estimators import WorkerMomentum

CONFIGS = [
    Path(reproduce.__file__).parent / "configs" / "reproduce" / name
    for name in ("mnist.yaml", "mnist_best.yaml", "cifar10.yaml", "league.yaml")
]

SMALL: dict[str, Any] = {
    "network": "torch.nn.Identity",
    "data": {"class_path": "DigitData", "init_args": {"batch_size": 4, "validation": 0}},
    "epochs": 2,
    "settings": [{"num_workers": 5, "num_byzantine": 2}],
    "partitions": {"IID": "IID"},
    "attacks": {"none": None, "sign flip": {"class_path": "SignFlip"}},
    "methods": {"worker momentum": {"estimator": {"class_path": "WorkerMomentum"}}, "none": {"estimator": None}},
    "rules": {"Mean": {"class_path": "Mean"}, "CTMA": {"class_path": "CTMA", "init_args": {"base": "Krum"}}},
    "learning_rates": [0.1],
    "seeds": [1, 2, 3],
}


def parsed(**changes: Any) -> Any:
    return grid_parser("", out="out").parse_object(SMALL | changes)


def small_cells(**changes: Any) -> list[Cell]:
    return cells(parsed(**changes))


def results_of(grid: list[Cell], accuracy: Any = lambda cell: 0.9) -> list[dict[str, Any]]:
    return [{**cell.labels, "accuracies": [0.5, accuracy(cell)], "seconds": 1.26, "run": cell.run} for cell in grid]


def test_a_grid_is_all_combinations() -> None:
    grid = small_cells()
    assert len(grid) == 2 * 2 * 2 * 3
    assert len({cell.key for cell in grid}) == len(grid)
    assert {cell.attack for cell in grid} == {"none", "sign flip"}


def test_nobody_attacks_where_nobody_is_byzantine() -> None:
    grid = small_cells(settings=[{"num_workers": 5, "num_byzantine": 0}])
    assert {cell.attack for cell in grid} == {"none"}


def test_a_cell_is_another_one_when_it_trains_differently_and_not_by_another_name() -> None:
    key = small_cells()[0].key
    assert small_cells()[0].key == key
    assert small_cells(epochs=3)[0].key != key
    assert small_cells(rules={"average": {"class_path": "Mean"}})[0].key == key


def test_options_that_came_later_leave_cells_the_same_unless_they_are_used() -> None:
    plain, *others = (
        small_cells(methods={"none": {"momentum": 0.9, **options}})[0].key
        for options in ({}, {"dampening": 0.0, "radius": None}, {"dampening": 0.9}, {"radius": 1})
    )
    assert set(small_cells()[0].run["method"]) == {"estimator", "momentum", "learning_rate_factor"}
    assert [key == plain for key in others] == [True, False, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epoch": 3}, "epoch"),
        ({"epochs": "many"}, "epochs"),
        ({"epochs": 0}, "epochs"),
        ({"rules": {"a": {"class_path": "Mena"}}}, r'"rules".*Mena'),
        ({"rules": {"a": {"class_path": "CTMA", "init_args": {"bas": "Mean"}}}}, r'"rules".*bas'),
        ({"rules": {"a": {"class_path": "GeometricMedian", "init_args": {"init": 3}}}}, r'"rules".*"init"'),
        ({"attacks": {"a": {"class_path": "SignFlip", "init_args": {"z": 1}}}}, r'"attacks".*z'),
        ({"methods": {"a": {"momentun": 0.9}}}, r'"methods".*momentun'),
        ({"settings": [{"num_workers": 5, "byzantine": 2}]}, r'"settings".*byzantine'),
        ({"settings": [{"num_workers": 5, "num_byzantine": 2, "assumed_byzantine": "most"}]}, r'"settings".*assumed'),
        ({"partitions": {"a": {"class_path": "Dirichlet"}}}, r'"partitions".*alpha'),
    ],
)
def test_errors_in_a_yaml_name_the_key_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(SMALL | changes))
    with pytest.raises(SystemExit):
        reproduce.main(["--config", str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "out")])
    assert re.search(message, capsys.readouterr().err, re.DOTALL)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": [{"num_workers": 4, "num_byzantine": 2}]}, "0 <= f < m / 2, got f=2 with m=4"),
        (
            {"settings": [{"num_workers": 5, "num_byzantine": 2, "assumed_byzantine": 3}]},
            "0 <= f < m / 2, got f=3 with m=5",
        ),
        ({"seeds": []}, "seeds must have at least one entry"),
        ({"partitions": {}}, "partitions must have at least one entry"),
        (
            {"data": {"class_path": "DigitData", "init_args": {"partition": "IID"}}},
            "data must have no partition, since the grid has partitions",
        ),
        (
            {"data": {"class_path": "DigitData", "init_args": {"path": "nowhere.npz"}}},
            "got nowhere.npz, which is not a file",
        ),
        ({"data": {"class_path": "Cifar10Data", "init_args": {"path": "nowhere"}}}, "To fetch it: curl"),
    ],
)
def test_what_cannot_run_is_said_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(SMALL | changes))
    with pytest.raises(SystemExit):
        reproduce.main(["--config", str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "out")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", CONFIGS[:3], ids=lambda path: path.stem)
def test_the_papers_configs_are_the_papers_grid(config: Path) -> None:
    options = grid_parser("", out="out").parse_args(["--config", str(config)])
    grid = cells(options)
    assert {(cell.num_workers, cell.num_byzantine) for cell in grid} == {(17, 8), (17, 4)}
    assert len({cell.attack for cell in grid}) == 5
    assert len({cell.method for cell in grid}) == 2
    # The mean; median and geometric median, plain and under CTMA, NNM and both; and in the first one the trimmed mean,
    # and all three under bucketing with and without CTMA.
    assert len({cell.rule for cell in grid}) == 1 + 2 * 4 + (4 + 3 * 2) * (config.stem == "mnist")
    rules = [CTMA(CoordinateWiseMedian()), GeometricMedian()]
    made = [repr(rule) for rule in grid_parser("", out="out").instantiate(options).rules.values()]
    assert repr(rules[0]) in made
    assert (repr(rules[1]) in made) == (config.stem == "mnist_best")


def name_of(rule: Aggregator) -> str:
    return type(rule).__name__ + (f"({name_of(rule.base)})" if isinstance(rule, MetaAggregator) else "")


def test_the_league_has_the_default_rule_and_runs_in_all_scenarios() -> None:
    options = grid_parser("", out="out").parse_args(["--config", str(CONFIGS[3])])
    grid = cells(options)
    scenarios = {scenario(cell.labels) for cell in grid}
    numbers = ["8 of 17", "4 of 17", "4 of 17, 8 assumed", "2 of 5"]
    assert scenarios == {f"{name}, {partition}" for name in numbers for partition in ("IID", "Dirichlet(0.3)")}
    assert {cell.seed for cell in grid} == {1, 2, 3}
    made = grid_parser("", out="out").instantiate(options)
    assert type(ByzantineDDPStrategy().aggregator) in map(type, made.rules.values())
    assert [name_of(rule) for rule in made.rules.values()] == list(made.rules)
    for setting in made.settings:
        for attack in filter(None, made.attacks.values()):
            attack.check(setting.num_workers, byzantine_workers(setting))


def test_each_worker_has_the_images_of_its_cells_partition() -> None:
    partitions = {"IID": "IID", "unlike": {"class_path": "Dirichlet", "init_args": {"alpha": 0.3}}}
    grid = small_cells(partitions=partitions)
    assert len(grid) == 2 * len(small_cells())
    made = {cell.partition: make_run(cell.run).data.partition for cell in grid}
    assert isinstance(made["IID"], IID)
    assert isinstance(made["unlike"], Dirichlet)
    assert made["unlike"].alpha == 0.3


def test_the_rule_may_assume_another_number_than_attack() -> None:
    grid = small_cells(settings=[{"num_workers": 5, "num_byzantine": 1, "assumed_byzantine": 2}])
    assert str(grid[0]) == "Mean, none, worker momentum, 1 of 5, 2 assumed, IID, learning rate 0.1, seed 1"
    run = make_run(grid[0].run)
    assert (run.setting.assumed, byzantine_workers(run.setting)) == (2, [4])
    assert make_run(small_cells()[0].run).setting.assumed == 2


def test_a_run_gets_the_objects_of_its_cell() -> None:
    cell = next(cell for cell in small_cells() if cell.attack == "sign flip" and cell.rule == "CTMA" and cell.seed == 3)
    run = make_run(json.loads(json.dumps(cell.run)))
    assert isinstance(run, Run)
    assert (run.setting.num_workers, run.setting.num_byzantine, run.seed, run.learning_rate) == (5, 2, 3, 0.1)
    assert repr(run.rule) == repr(CTMA(Krum()))
    assert repr(run.method.estimator) == repr(WorkerMomentum())


def trained(folder: Path) -> list[str]:
    return (folder / "trained.txt").read_text().split()


def few_cells() -> list[Cell]:
    return small_cells(attacks={"none": None}, methods={"none": {"estimator": None}}, rules={"Mean": "Mean"})


@pytest.mark.slow
def test_a_killed_cell_is_repeated_and_the_others_are_not(tmp_path: Path) -> None:
    grid = few_cells()
    with pytest.raises(CellError, match="1 of 3 cells failed"):
        run_cells(grid, tmp_path / "cells", jobs=2, work=die_half_way_once)
    assert sorted(trained(tmp_path)) == sorted(cell.key for cell in grid if cell.seed != 2)
    assert sorted(path.name for path in (tmp_path / "cells").glob("[!.]*")) == sorted(trained(tmp_path))
    results = run_cells(grid, tmp_path / "cells", jobs=2, work=die_half_way_once)
    assert len(trained(tmp_path)) == 3
    assert [result["seed"] for result in results] == [1, 2, 3]
    assert all(result["accuracies"] == [0.5, 0.75] for result in results)
    # Once more, there is nothing to do.
    assert run_cells(grid, tmp_path / "cells", jobs=2, work=die_half_way_once) == results
    assert len(trained(tmp_path)) == 3


@pytest.mark.slow
def test_an_interruption_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(futures: Any) -> Any:
        done = wait(futures, return_when=FIRST_COMPLETED).done
        yield next(iter(done))
        raise KeyboardInterrupt

    grid = few_cells()
    with monkeypatch.context() as patch:
        patch.setattr(reproduction.runner, "as_completed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_cells(grid, tmp_path / "cells", jobs=1, work=finish)
    before = trained(tmp_path)
    assert before
    run_cells(grid, tmp_path / "cells", jobs=1, work=finish)
    assert sorted(trained(tmp_path)) == sorted(cell.key for cell in grid)


@pytest.mark.slow
def test_cells_of_the_same_training_are_trained_once(tmp_path: Path) -> None:
    grid = small_cells(
        attacks={"none": None}, methods={"none": {"estimator": None}}, rules={"Mean": "Mean", "average": "Mean"}
    )
    results = run_cells(grid, tmp_path / "cells", jobs=1, work=finish)
    assert len(trained(tmp_path)) == 3
    assert [result["rule"] for result in results] == ["Mean"] * 3 + ["average"] * 3


def test_the_table_has_a_row_for_each_cell(tmp_path: Path) -> None:
    results = results_of(small_cells())
    write_csv(results, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results)
    assert rows[0] == {
        "attack": "none",
        "estimator": "worker momentum",
        "rule": "Mean",
        "workers": "5",
        "byzantine": "0",
        "num_byzantine": "2",
        "partition": "IID",
        "batch_per_worker": "4",
        "lr": "0.1",
        "seed": "1",
        "accuracy_epoch_1": "0.5",
        "accuracy_epoch_2": "0.9",
        "seconds": "1.3",
    }
    assert rows[-1]["byzantine"] == "2"


@pytest.mark.parametrize(
    ("ours", "reference", "agrees"),
    [
        ((0.90,), 0.93, True),
        ((0.90,), 0.931, False),
        ((0.90, 0.90, 0.90), 0.85, False),
        ((0.80, 0.90, 1.00), 0.61, True),  # 3 standard deviations of 0.1
        ((0.80, 0.90, 1.00), 0.59, False),
    ],
)
def test_the_verdict_allows_003_or_three_deviations(ours: tuple[float, ...], reference: float, agrees: bool) -> None:
    assert Comparison(("", "", "", 17, 8, 4, 0.1, "IID", None), ours, reference).agrees == agrees


def test_cells_find_their_reference(tmp_path: Path) -> None:
    names = {
        "attacks": {"none": None, "IPM(0.5)": {"class_path": "InnerProductManipulation"}},
        "methods": {"worker momentum 0.9": {"estimator": None}},
        "rules": {"CTMA(GeometricMedian(3 iterations))": {"class_path": "Mean"}, "Mean": {"class_path": "Mean"}},
    }
    reference = tmp_path / "reference.csv"
    reference.write_text(
        "attack,estimator,rule,workers,byzantine,batch_per_worker,lr,seed,accuracy_epoch_1,accuracy_epoch_2,seconds\n"
        'IPM(0.5),worker momentum 0.9,"CTMA(GeometricMedian(3 iterations from 0, smoothing 0.1))",5,2,4,0.1,1,0,0.5,9\n'
        "IPM(0.5),worker momentum 0.9,Mean,5,1,4,0.1,1,0.2,0.5,9\n"  # another number of attackers
        "none,worker momentum 0.9,Mean,5,0,4,0.1,1,0.8,0.91,9\n"
    )
    comparisons = compare(results_of(small_cells(**names)), reference)
    assert [(entry.cell[0], entry.cell[2], entry.reference) for entry in comparisons] == [
        ("none", "Mean", 0.91),
        ("IPM", "CTMA(GeometricMedian)", 0.5),
    ]
    assert [entry.agrees for entry in comparisons] == [True, False]
    assert all(len(entry.ours) == 3 for entry in comparisons)
    text = report(comparisons)
    assert "| IPM | worker momentum | CTMA(GeometricMedian) | 0.9000 | 0.0000 | 0.5000 | +0.4000 | NO |" in text
    assert "1 of 2 cells agree" in text


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for panel in figure.axes for text in panel.texts]


def test_the_heat_map_shows_the_worst_case_of_each_rule() -> None:
    accuracies = {("none", "Mean"): 0.9, ("none", "CTMA"): 0.8, ("sign flip", "Mean"): 0.1, ("sign flip", "CTMA"): 0.7}
    results = results_of(small_cells(), lambda cell: accuracies[cell.attack, cell.rule])
    figure = heat_map(results)
    assert texts(figure) == ["0.900", "0.100", "0.100", "0.800", "0.700", "0.700"] * 2  # two methods
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["none", "sign flip", "worst case"]


def ranked_cells() -> list[dict[str, Any]]:
    """Return results of two rules: one is better in the worst case, the other one in the mean of the five worst."""
    accuracies = {"Mean": [0.3, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9], "CTMA": [0.5, 0.5, 0.5, 0.5, 0.5, 0.9, 0.9, 1.0]}
    grid = small_cells(
        settings=[{"num_workers": 5, "num_byzantine": 2}, {"num_workers": 5, "num_byzantine": 1}],
        partitions={"IID": "IID", "unlike": {"class_path": "Dirichlet", "init_args": {"alpha": 0.3}}},
        methods={"none": {"estimator": None}},
        seeds=[1, 2],
    )
    cases = list(dict.fromkeys((scenario(cell.labels), cell.attack) for cell in grid))
    assert len(cases) == 8

    def accuracy(cell: Cell) -> float:
        of_case = accuracies[cell.rule][cases.index((scenario(cell.labels), cell.attack))]
        return of_case + (0.05 if cell.seed == 1 else -0.05)

    return results_of(grid, accuracy)


def test_rules_are_ranked_by_their_worst_mean_over_seeds(tmp_path: Path) -> None:
    entries = ranking(ranked_cells())
    assert [entry.name[0] for entry in entries] == ["CTMA", "Mean"]
    assert [entry.worst for entry in entries] == pytest.approx([0.5, 0.3])
    assert [entry.five_worst for entry in entries] == pytest.approx([0.5, (0.3 + 4 * 0.9) / 5])
    assert entries[1].worst_case == ("2 of 5, IID", "none")
    assert entries[0].worst_in("1 of 5, unlike") == pytest.approx(0.9)
    write_ranking(entries, tmp_path / "ranking.csv")
    with (tmp_path / "ranking.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["worst"]) for row in rows] == pytest.approx([0.5, 0.3])
    assert rows[1]["worst_case_attack"] == "none"


def test_the_table_of_the_ranking_has_the_best_of_each_column_in_bold() -> None:
    first, second = ranking_table(ranking(ranked_cells())).splitlines()[2:]
    assert first.startswith("| 1 | `CTMA` | none | 2 of 5, IID: none | **0.500** | 0.500 |")
    assert second.startswith("| 2 | `Mean` | none | 2 of 5, IID: none | 0.300 | **0.780** |")


def test_the_picture_of_the_ranking_shows_the_worst_of_each_scenario() -> None:
    figure = ranking_map(ranking(ranked_cells()))
    of_ctma = ["0.500", "0.500", "0.500", "0.900", "0.500", "0.500"]
    of_mean = ["0.300", "0.900", "0.900", "0.900", "0.780", "0.300"]
    assert texts(figure) == of_ctma + of_mean
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels[-3:] == ["1 of 5, unlike", "mean of five worst", "worst case"]


def test_a_reference_is_of_iid_images_and_any_f_unless_it_says_more(tmp_path: Path) -> None:
    results = results_of(
        small_cells(
            settings=[
                {"num_workers": 5, "num_byzantine": 1},
                {"num_workers": 5, "num_byzantine": 1, "assumed_byzantine": 2},
            ],
            partitions={"IID": "IID", "unlike": {"class_path": "Dirichlet", "init_args": {"alpha": 0.3}}},
            rules={"Mean": "Mean"},
            methods={"none": {"estimator": None}},
        )
    )
    write_csv(results, tmp_path / "all.csv")
    assert len(compare(results, tmp_path / "all.csv")) == 2 * 2 * 2
    with (tmp_path / "all.csv").open(newline="") as file:
        rows = [
            {k: v for k, v in row.items() if k not in ("partition", "num_byzantine")} for row in csv.DictReader(file)
        ]
    with (tmp_path / "less.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    comparisons = compare(results, tmp_path / "less.csv")
    assert [entry.cell[-2:] for entry in comparisons] == [("IID", None)] * 2


def test_the_curves_are_means_over_seeds() -> None:
    figure = curves(results_of(small_cells(), lambda cell: cell.seed / 10))
    assert len(figure.axes) == 4  # attacks x methods
    for panel in figure.axes:
        assert len(panel.lines) == 2  # rules
        for line in panel.lines:
            np.testing.assert_allclose(line.get_xydata(), [[1, 0.5], [2, 0.2]])


@pytest.mark.slow
def test_both_pictures_are_drawn_for_each_setting(tmp_path: Path) -> None:
    settings = [{"num_workers": 5, "num_byzantine": 2}, {"num_workers": 5, "num_byzantine": 1}]
    results = results_of(small_cells(settings=settings, seeds=[1]))
    paths = draw(results, tmp_path)
    names = [f"{kind}-{number}-of-5-iid.png" for number in (2, 1) for kind in ("curves", "heatmap")]
    assert [path.name for path in paths] == [*names, "ranking.png"]
    first = [path.read_bytes() for path in paths]
    assert all(content.startswith(b"\x89PNG") for content in first)
    assert [path.read_bytes() for path in draw(results, tmp_path)] == first


@pytest.fixture
def images(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    pixels, labels = generator.integers(256, size=(90, 28, 28), dtype=np.uint8), np.arange(90) % 10
    np.savez(tmp_path / "images.npz", x_train=pixels, y_train=labels, x_test=pixels[:20], y_test=labels[:20])
    return tmp_path / "images.npz"


def test_from_a_yaml_to_tables_and_pictures(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = SMALL | {
        "network": "reproduction.networks.DigitNetwork",
        "attacks": {"label flip": {"class_path": "LabelFlip", "init_args": {"num_classes": 10}}},
        "methods": {
            "worker momentum": {"estimator": "WorkerMomentum"},
            "double momentum": {"estimator": "DoubleMomentumEstimator"},
        },
        "rules": {"Mean": "Mean"},
        "seeds": [1],
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    out = tmp_path / "out"
    arguments = ["--config", str(tmp_path / "grid.yaml"), f"--data.path={images}", "--out", str(out), "--jobs=2"]
    reproduce.main(arguments)
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["estimator"] for row in rows] == ["worker momentum", "double momentum"]
    pictures = {"curves-2-of-5-iid.png", "heatmap-2-of-5-iid.png", "ranking.png"}
    assert {path.name for path in out.glob("*.png")} == pictures
    assert (out / "ranking.md").read_text() in capsys.readouterr().out
    finished = list((out / "cells").iterdir())
    assert len(finished) == 2
    for folder in finished:
        events = EventAccumulator(str(folder)).Reload()
        accuracies = [event.value for event in events.Scalars("test_accuracy")]
        assert accuracies == pytest.approx(json.loads((folder / RESULT).read_text())["accuracies"])
        assert yaml.safe_load((folder / "hparams.yaml").read_text())["attack"] == "label flip"
    times = [(folder / RESULT).stat().st_mtime_ns for folder in finished]
    # Again, and against itself: nothing is trained, and all agrees.
    capsys.readouterr()
    reproduce.main([*arguments, "--reference", str(out / "results.csv")])
    assert [(folder / RESULT).stat().st_mtime_ns for folder in finished] == times
    assert "2 of 2 cells agree" in capsys.readouterr().out
    assert (out / "comparison.md").is_file()
