"""Rectified flow on a 2-D family, twenty seconds: ``configs/toy2d.py:checkerboard`` picks another."""

from jaxdiff.config import default


def get_config(family="two_moons"):
    config = default()
    config.data.name = f"toy2d:{family}"
    config.data.batch_size = 512
    config.data.conditional = False
    config.network.name = "mlp"
    config.network.width = 128
    config.network.depth = 3
    config.objective.coupling = "independent"
    config.optimiser.learning_rate = 2e-3
    config.train.steps = 2000
    config.train.save_every = 1000
    config.solver.name = "heun"
    config.solver.steps = 25
    return config
