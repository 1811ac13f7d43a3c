"""Class-conditional rectified flow on scikit-learn's 8x8 digits: the demo, minutes on two CPU cores."""

from jaxdiff.config import default


def get_config():
    config = default()
    config.data.name = "digits"
    config.data.batch_size = 128
    config.process.name = "linear"
    config.network.name = "unet"
    config.network.channels = 24
    config.network.multipliers = (1, 2)
    config.network.blocks = 1
    config.objective.target = "velocity"
    config.objective.time = "logit_normal"
    config.objective.label_drop = 0.1
    config.optimiser.learning_rate = 2e-3
    config.optimiser.warmup = 100
    config.ema.decay = 0.995
    config.train.steps = 900
    config.train.save_every = 300
    config.solver.name = "heun"
    config.solver.steps = 20
    config.eval.guidance_scale = 1.2
    return config
