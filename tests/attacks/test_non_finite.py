import numpy as np
from cases import AttackCase, Exempt

from lightning_byzantine.attacks import NonFinite

CASES = [
    AttackCase(
        NonFinite(),
        lambda honest, own: [np.full_like(row, np.nan) for row in own],
        [Exempt(["finite"], because="that is the attack")],
    )
]
