"""Class-conditional rectified flow on MNIST 28x28 from tfds (set TFDS_DATA_DIR to the prepared data).

``configs/mnist.py`` is sized for two CPU cores, some eleven minutes in all; experiments/mnist/ has what it gives.
``configs/mnist.py:gpu`` is the same task at a size that keeps one accelerator busy; it has not been run, but its train step and
sampler lower for GPUs and TPUs (tests/train/test_platforms.py).
"""

from jaxdiff.config import ConfigError, default


def get_config(machine="cpu"):
    if machine not in ("cpu", "gpu"):
        raise ConfigError(f"config: configs/mnist.py:{machine} given; allowed after the colon: cpu, gpu")
    config = default()
    config.data.name = "tfds:mnist"
    config.network.name = "unet"
    config.objective.time = "logit_normal"
    config.optimiser.warmup = 100
    config.solver.name = "dpm_solver_pp"
    config.eval.guidance_scale = 1.5
    if machine == "cpu":
        # convolutions at 28x28 are what costs: few channels there, many at 7x7
        config.data.batch_size = 64
        config.network.channels = 16
        config.network.multipliers = (1, 2, 4)
        config.network.blocks = 1
        config.optimiser.learning_rate = 2e-3
        config.ema.decay = 0.995
        config.train.steps = 1200
        config.train.save_every = 300
        config.solver.steps = 15
        config.eval.num = 500
    else:
        config.data.batch_size = 256
        config.network.channels = 64
        config.network.multipliers = (1, 2, 2)
        config.network.blocks = 2
        config.network.attention = (7,)
        config.train.precision = "bfloat16"
        config.optimiser.learning_rate = 5e-4
        config.optimiser.warmup = 500
        config.ema.decay = 0.999
        config.train.steps = 20_000
        config.train.save_every = 2000
        config.solver.steps = 20
        config.eval.num = 5000
    return config
