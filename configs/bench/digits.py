"""A stated small grid on the trained digits model: ten solvers at guidance scale 1.5, minutes on two cores."""

from jaxdiff.commands.bench_config import default

SOLVERS = [
    "euler",
    "heun",
    "deis",
    ("dpm_solver", {"order": 3, "method": "multistep"}),
    "dpm_solver_pp",
    ("dpm_solver_pp", {"order": 3}),
    ("ghvb", {"order": 2.8}),
    "unipc",
    ("ddim", {"eta": 1.0}),
    "dpm_solver_pp_sde",
]


def get_config(workdir="runs/digits"):
    config = default()
    config.title = "Solvers on the digits model, guidance scale 1.5"
    config.world = "run"
    config.workdir = workdir
    config.solvers = tuple(SOLVERS)
    config.grids = ("uniform", "logsnr")
    config.nfe = (5, 10, 20)
    config.guidance_scales = (1.5,)
    config.samples = 256
    config.batch = 128
    config.chunk = 4
    config.reference_samples = 1024
    config.reference_steps = 64
    return config
