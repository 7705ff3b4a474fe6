"""The paper's experiments: rules x attacks x estimators x seeds x numbers of workers x partitions, from one YAML.

``python examples/reproduce.py --config examples/configs/reproduce/mnist.yaml --data.path=mnist.npz``. Each cell of the
grid is a separate training run, with Lightning's Trainer and ``ByzantineDDPStrategy``. Run the same command again after
an interruption: finished cells are not repeated.
"""

from pathlib import Path

from reproduction.command import announce, grid_parser, run_grid
from reproduction.pictures import draw
from reproduction.ranking import ranking, ranking_table, write_ranking
from reproduction.results import compare, report


def main(arguments: list[str] | None = None) -> None:
    """Run the grid, draw its pictures, rank its rules, and compare it with a reference."""
    parser = grid_parser(__doc__, out="runs/reproduce")
    parser.add_argument("--reference", type=str | None, default=None, help="a CSV to compare the results with")
    options = parser.parse_args(arguments)
    if options.reference is not None and not Path(options.reference).is_file():
        parser.error(f"--reference must be a CSV, got {options.reference}, which is not a file")
    results = run_grid(parser, options)
    folder = Path(options.out)
    entries = ranking(results)
    write_ranking(entries, folder / "ranking.csv")
    (folder / "ranking.md").write_text(ranking_table(entries) + "\n")
    print(ranking_table(entries))
    tables = [folder / name for name in ("results.csv", "ranking.csv", "ranking.md")]
    announce([*tables, *draw(results, folder)])
    if options.reference is not None:
        text = report(compare(results, Path(options.reference)))
        (folder / "comparison.md").write_text(text + "\n")
        print(f"\n{text}")


if __name__ == "__main__":
    main()
