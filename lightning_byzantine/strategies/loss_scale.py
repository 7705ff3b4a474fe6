"""The factor that a gradient scaler has multiplied the loss by."""

from lightning.pytorch.plugins.precision import MixedPrecision, Precision

__all__ = ["loss_scale"]


def loss_scale(precision: Precision) -> float | None:
    """Return the present factor; None without a gradient scaler."""
    if isinstance(precision, MixedPrecision) and precision.scaler is not None and precision.scaler.is_enabled():
        return float(precision.scaler.get_scale())
    return None
