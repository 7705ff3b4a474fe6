"""How ranks know where the others are, and end together instead of waiting for ever."""

from lightning_byzantine.watch.rank_watch import RankWatch

__all__ = ["RankWatch"]
