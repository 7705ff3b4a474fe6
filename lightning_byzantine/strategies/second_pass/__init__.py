"""The training step once more: at the previous query point, for double momentum, or another worker's, for audits.

- ``wrapping`` puts the module's optimizer under ``DoubleMomentum``, or refuses modules that can't be run twice.
- ``redirection`` replaces DDP's call of ``training_step``: first at the previous point, for the gradient g~_t alone,
  then as usual; it hands g~_t of each worker to the estimator.
- ``gradients`` computes the gradients of such a pass past DDP.
- ``isolation`` removes all other effects of the additional pass: random numbers, logs, metrics, attributes.
- ``snapshot`` remembers and restores what the module and the batch hold, for ``isolation``.
"""
