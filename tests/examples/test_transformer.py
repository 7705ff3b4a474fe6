from pathlib import Path

import torch
from lightning.pytorch.cli import LightningCLI
from transformer import BYTES, Config, StandardLibrary, Transformer

from lightning_byzantine import ByzantineModelParallelStrategy
from lightning_byzantine.callbacks import ByzantineMonitor, ByzantineSimulation

CONFIG = Path(__file__).parents[2] / "examples" / "configs" / "transformer.yaml"


def test_it_sees_only_what_comes_before() -> None:
    torch.manual_seed(0)
    model = Transformer(Config(layers=1, width=16))
    text = torch.randint(BYTES, (2, 10))
    other = text.clone()
    other[:, 6:] = 0
    torch.testing.assert_close(model(text)[:, :6], model(other)[:, :6])
    assert not torch.allclose(model(text)[:, 6:], model(other)[:, 6:])


def test_it_learns_from_what_python_comes_with() -> None:
    torch.manual_seed(0)
    model, data = Transformer(Config(layers=1, width=32)), StandardLibrary()
    optimizer, losses = model.configure_optimizers(), []
    for batch, _ in zip(data.train_dataloader(), range(15), strict=False):
        losses.append(model.loss(batch))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5


def test_the_config_attacks_one_of_three_replicas() -> None:
    arguments = ["--config", str(CONFIG), "--trainer.enable_progress_bar=false"]
    trainer = LightningCLI(Transformer, StandardLibrary, run=False, save_config_callback=None, args=arguments).trainer
    assert isinstance(trainer.strategy, ByzantineModelParallelStrategy)
    assert trainer.strategy.num_workers == 3
    (simulation,) = (callback for callback in trainer.callbacks if isinstance(callback, ByzantineSimulation))
    assert simulation.workers == [1]
    assert any(isinstance(callback, ByzantineMonitor) for callback in trainer.callbacks)
