"""The second pass of double momentum: the training step once more, at the previous query point.

- ``wrapping`` puts the module's optimizer under ``DoubleMomentum``, or refuses modules that can't be run twice.
- ``redirection`` replaces DDP's call of ``training_step``: first at the previous point, for the gradient g~_t alone,
  then as usual; it hands g~_t of each worker to the estimator.
- ``isolation`` removes all other effects of the first of the two passes: random numbers, logs, metrics, attributes.
- ``snapshot`` remembers and restores what the module and the batch hold, for ``isolation``.
"""
