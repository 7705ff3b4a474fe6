"""Train a small language model, divided by FSDP2 in three replicas, of which one sends noise.

``python examples/transformer.py fit --config examples/configs/transformer.yaml``. It learns to write the next byte of
Python's own standard library, so that nothing is downloaded.
"""

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, TensorDataset

import lightning_byzantine.callbacks  # noqa: F401  (registers the strategies and the class names)

BYTES = 128  # of ASCII


@dataclass
class Config:
    """The shape of a transformer.

    Args:
        layers: number of layers.
        heads: number of heads in each.
        width: number of features, a multiple of ``heads``.
        context: number of bytes that it sees.

    """

    layers: int = 2
    heads: int = 4
    width: int = 64
    context: int = 64


class Transformer(pl.LightningModule):
    """A decoder in the manner of GPT-2, on bytes; the output has the embedding's weight.

    Args:
        config: its shape.
        lr: learning rate of AdamW.

    """

    def __init__(self, config: Config, lr: float = 3e-3) -> None:
        super().__init__()
        self.lr = lr
        self.embedding = nn.Embedding(BYTES, config.width)
        self.positions = nn.Parameter(0.02 * torch.randn(config.context, config.width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                config.width, config.heads, 4 * config.width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.output = nn.Linear(config.width, BYTES, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.output.weight = self.embedding.weight

    def configure_model(self) -> None:
        """Divide each layer, and what is left, among the ranks of a replica: as for ModelParallelStrategy."""
        if isinstance(self, FSDPModule):  # called once more, to test
            return
        mesh = self.device_mesh["data_parallel"]
        for layer in self.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self, mesh=mesh)

    def forward(self, text: Tensor) -> Tensor:
        length = text.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=text.device)
        hidden = self.embedding(text) + self.positions[:length]
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask, is_causal=True)
        logits: Tensor = self.output(self.norm(hidden))
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def loss(self, batch: list[Tensor]) -> Tensor:
        """Return the mean cross-entropy of the next byte."""
        (text,) = batch
        return nn.functional.cross_entropy(self(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class StandardLibrary(pl.LightningDataModule):
    """Pieces of Python's standard library.

    Args:
        length: of one piece, in bytes.
        batch_size: pieces in one batch of one rank.

    """

    def __init__(self, length: int = 64, batch_size: int = 16) -> None:
        super().__init__()
        folder = Path(sysconfig.get_paths()["stdlib"])
        text = "".join(path.read_text(errors="ignore") for path in sorted(folder.glob("*.py"))[:60])
        data = torch.tensor([byte for byte in text.encode() if byte < BYTES])
        self.pieces = data[: len(data) // length * length].view(-1, length)
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.pieces[: -10 * self.batch_size]), self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.pieces[-10 * self.batch_size :]), self.batch_size)


def main() -> None:
    """Run the command line."""
    cli = LightningCLI(Transformer, StandardLibrary, seed_everything_default=1, save_config_callback=None)
    if cli.subcommand == "fit":
        cli.trainer.test(cli.model, cli.datamodule)
    # Otherwise gloo's threads would abort the process at exit.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
