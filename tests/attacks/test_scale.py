from cases import AttackCase

from lightning_byzantine.attacks import Scale

CASES = [AttackCase(Scale(factor=-3.0), lambda honest, own: [-3.0 * row for row in own])]
