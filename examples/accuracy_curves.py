"""The picture in the README: test accuracy over training steps, with and without an attack.

``python examples/accuracy_curves.py``. Stock DDP without an attack, stock DDP attacked and byzantine_ddp attacked, five
workers on one machine, two of them Byzantine. Each run is ``examples/train.py`` with a file in ``examples/configs``.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
from compare import ATTACKS, scalars
from matplotlib.figure import Figure
from reproduction.pictures import save

# Curve: steps and the mean accuracy after each of them.
Curve = Sequence[tuple[int, float]]

LINES = {
    "clean": ("ddp, no attack", "#8b949e", "--"),
    "attacked": ("ddp, attacked", "#e5534b", "-"),
    "byzantine": ("byzantine_ddp, attacked", "#3a8bdb", "-"),
}
_GREY = "#7d8590"  # legible on white and on black


def main(arguments: list[str] | None = None) -> None:
    """Train, draw the curves and print where each ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attack", choices=ATTACKS, default="LabelFlip")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="the picture shows the mean over them")
    parser.add_argument("--out", type=Path, default=Path("accuracy_curves.png"), help="output file")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="the rest goes to examples/train.py")
    options = parser.parse_args(arguments)
    curves = {
        config: accuracy_curve(config, None if config == "clean" else options.attack, options.seeds, options.options)
        for config in LINES
    }
    for config, curve in curves.items():
        print(f"{LINES[config][0]}: {curve[-1][1]:.3f} after {curve[-1][0]} steps")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save(draw_curves(curves), options.out)
    print(f"Written: {options.out}")


def accuracy_curve(config: str, attack: str | None, seeds: Sequence[int], options: list[str]) -> Curve:
    """Return the accuracy on the test images after each epoch, a mean over the seeds."""
    # Without training images for validation, the test images are used.
    options = ["--data.validation=0", *options]
    runs = [scalars(config, attack, seed, options, "val_accuracy") for seed in seeds]
    return [(events[0].step + 1, mean(event.value for event in events)) for events in zip(*runs, strict=True)]


def draw_curves(curves: Mapping[str, Curve]) -> Figure:
    """Draw a line for each configuration, with its name at its end."""
    figure, axes = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    for config, curve in curves.items():
        label, color, style = LINES[config]
        axes.plot(*zip(*curve, strict=True), color=color, linestyle=style, linewidth=2.5, label=label)
    axes.set(xlabel="training steps", ylabel="test accuracy", ylim=(0, 1.02), xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(_GREY)
    axes.tick_params(colors=_GREY)
    axes.xaxis.label.set_color(_GREY)
    axes.yaxis.label.set_color(_GREY)
    axes.grid(color=_GREY, alpha=0.25)
    axes.legend(loc="lower right", frameon=False, labelcolor=_GREY, fontsize=11)
    return figure


if __name__ == "__main__":
    main()
