"""Ways on which gradients would go around the aggregation."""

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

__all__ = ["refuse_detours"]

# Arguments of DDPStrategy and DistributedDataParallel.
_DETOURS = (
    "ddp_comm_hook",
    "ddp_comm_state",
    "ddp_comm_wrapper",
    "delay_all_reduce_named_params",
    "device_mesh",
    "mixed_precision",
    "model_averaging_period",
    "param_to_hook_all_reduce",
    "process_group",
    "skip_all_reduce_unused_params",
)


def refuse_detours(arguments: dict[str, Any]) -> None:
    """Raise :class:`MisconfigurationException` if an argument of DDP would take gradients around the aggregation."""
    for name in _DETOURS:
        if arguments.get(name):
            raise MisconfigurationException(
                "ByzantineDDPStrategy aggregates all gradients of all ranks in DDP's only communication hook, so it"
                f" can't take `{name}`, got {name}={arguments[name]!r}. Leave it out, or use `strategy='ddp'`."
            )
