"""Train a few steps the way a user's script does; print what the parameters of each rank became."""

import argparse
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from training import Regression, parameters

import lightning_byzantine  # noqa: F401


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--strategy", default="byzantine_ddp")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--num-nodes", type=int, default=1)
    arguments = parser.parse_args()

    pl.seed_everything(1)
    model = PrintsItsParameters()
    trainer = pl.Trainer(
        strategy=arguments.strategy,
        accelerator="cpu",
        devices=arguments.devices,
        num_nodes=arguments.num_nodes,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data())
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class PrintsItsParameters(Regression):
    def on_train_end(self) -> None:
        # One write, so that lines of several processes do not mix.
        sys.stdout.write(f"rank {self.global_rank} of {self.trainer.world_size}: {parameters(self).sum().item()!r}\n")
        sys.stdout.flush()


def data() -> torch.utils.data.DataLoader:
    inputs = torch.randn(48, 8, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=4
    )


if __name__ == "__main__":
    main()
