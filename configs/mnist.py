"""Class-conditional rectified flow on MNIST 28x28 from tfds (set TFDS_DATA_DIR to the prepared data)."""

from jaxdiff.config import default


def get_config():
    config = default()
    config.data.name = "tfds:mnist"
    config.data.batch_size = 128
    config.network.name = "unet"
    config.network.channels = 32
    config.network.multipliers = (1, 2, 2)
    config.network.blocks = 1
    config.objective.time = "logit_normal"
    config.optimiser.learning_rate = 1e-3
    config.ema.decay = 0.999
    config.train.steps = 5000
    config.solver.name = "heun"
    config.solver.steps = 20
    return config
