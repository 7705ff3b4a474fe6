"""Byzantine-robust data-parallel training for PyTorch Lightning, by one flag.

Importing the package registers its strategies: ``Trainer(strategy="byzantine_ddp")``, and the same for ``Fabric``.
"""

from lightning_byzantine.errors import (
    ByzantineBreakdownError,
    ByzantineSuspectError,
    EquivocationError,
    InconsistentRanksError,
    WorkerLostError,
)
from lightning_byzantine.fabric.registry import register_strategies as register_strategies_of_fabric
from lightning_byzantine.strategies.byzantine_ddp import ByzantineDDPStrategy
from lightning_byzantine.strategies.registry import register_strategies
from lightning_byzantine.strategies.sharded.byzantine_model_parallel import ByzantineModelParallelStrategy

__all__ = [
    "ByzantineBreakdownError",
    "ByzantineDDPStrategy",
    "ByzantineModelParallelStrategy",
    "ByzantineSuspectError",
    "EquivocationError",
    "InconsistentRanksError",
    "WorkerLostError",
]
__version__ = "0.1.0"

register_strategies()
register_strategies_of_fabric()
