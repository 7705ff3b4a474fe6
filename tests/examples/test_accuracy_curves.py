"""The README's picture."""

from pathlib import Path
from typing import Any

import accuracy_curves
import matplotlib.pyplot as plt
import pytest
from accuracy_curves import accuracy_curve, draw_curves, main
from tensorboard.backend.event_processing.event_accumulator import ScalarEvent

CURVES = {
    "clean": [(8, 0.5), (16, 0.9)],
    "attacked": [(8, 0.2), (16, 0.1)],
    "byzantine": [(8, 0.4), (16, 0.8)],
}


def logged(config: str, attack: str | None, seed: int, options: list[str], name: str) -> list[ScalarEvent]:
    """Stand for a training run, whose accuracy depends on the seed."""
    assert (attack is None) == (config == "clean")
    assert "--data.validation=0" in options
    assert name == "val_accuracy"
    return [ScalarEvent(0.0, step - 1, accuracy + 0.01 * seed) for step, accuracy in CURVES[config]]


def test_a_curve_is_the_mean_over_the_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy_curves, "scalars", logged)
    curve = accuracy_curve("attacked", "LabelFlip", [1, 2, 3], [])
    assert curve == [(8, pytest.approx(0.22)), (16, pytest.approx(0.12))]


def test_the_picture_has_a_line_for_each_run() -> None:
    axes = draw_curves(CURVES).axes[0]
    drawn = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
    plt.close(axes.figure)
    assert drawn == {
        "ddp, no attack": CURVES["clean"],
        "ddp, attacked": CURVES["attacked"],
        "byzantine_ddp, attacked": CURVES["byzantine"],
    }


def test_writes_a_small_picture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accuracy_curves, "scalars", logged)
    picture = tmp_path / "new" / "curves.png"
    main(["--seeds", "1", "--out", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 60_000
    assert "byzantine_ddp, attacked: 0.810 after 16 steps" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_trains_and_reads_what_was_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: list[Any] = ["--seeds", "1", "--out", tmp_path / "curves.png", "--options", "--trainer.max_epochs=2"]
    main([str(option) for option in options])
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said[:3]] == [label for label, *_ in accuracy_curves.LINES.values()]
    assert all(line.endswith("after 16 steps") for line in said[:3])
