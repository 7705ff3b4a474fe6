"""The runner behind ``examples/reproduce.py`` and ``examples/tuning.py``: a grid of training runs from one YAML."""
