"""Train on handwritten digits, then test: ``python examples/train.py fit --config examples/configs/byzantine.yaml``."""

import torch
from digits import DigitClassifier, DigitData
from lightning.pytorch.cli import LightningCLI

import lightning_byzantine.callbacks  # noqa: F401  (registers the strategies and the class names)


def main() -> None:
    """Run the command line."""
    logger = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "."}}
    cli = LightningCLI(
        DigitClassifier,
        DigitData,
        seed_everything_default=1,
        trainer_defaults={"logger": logger, "log_every_n_steps": 5},
    )
    if cli.subcommand == "fit":
        cli.trainer.test(cli.model, cli.datamodule)
    # Otherwise gloo's threads would abort the process at exit.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
