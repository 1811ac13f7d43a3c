"""The smallest run that does everything: a two-layer network on 2-D points."""


def config(steps: int = 100, save_every: int = 25, extra: str = "") -> str:
    """Text of a config file; ``extra`` is one more line of its body."""
    return f"""
from jaxdiff.config import default

def get_config():
    config = default()
    config.data.name = "toy2d:two_moons"
    config.data.batch_size = 32
    config.network.name = "mlp"
    config.network.width = 16
    config.network.depth = 1
    config.optimiser.warmup = 5
    config.train.steps = {steps}
    config.train.save_every = {save_every}
    config.train.log_every = 10
    config.train.tensorboard = False
    config.solver.name = "euler"
    config.solver.steps = 4
    {extra}
    return config
"""
