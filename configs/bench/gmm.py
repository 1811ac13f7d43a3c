"""Every solver, in its usual variants, on an eight-component mixture in the plane: exact end points, minutes on two cores."""

import numpy as np

from jaxdiff.commands.bench_config import default

# one-evaluation, two-evaluation and multistep methods; the first entries are each method's own default
SOLVERS = [
    *(("euler", {"clock": clock}) for clock in ("time", "rho")),
    *(("heun", {"clock": clock}) for clock in ("time", "rho")),
    *(("rk4", {"clock": clock}) for clock in ("time", "rho")),
    *(("rho_rk", {"tableau": tableau}) for tableau in ("midpoint", "2heun", "3kutta")),
    *(("exp_rk", {"tableau": tableau}) for tableau in ("res2", "res3")),
    "dpm2",
    "conjugate",
    *(("dpm_solver", {"order": order, "method": "fast"}) for order in (2, 3)),
    *(("dpm_solver", {"order": order, "method": "singlestep"}) for order in (2, 3)),
    *(("dpm_solver", {"order": order, "method": "multistep"}) for order in (2, 3)),
    *(("dpm_solver_pp", {"order": order}) for order in (1, 2, 3)),
    *(("dpm_solver_pp", {"order": order, "variant": "lagrange"}) for order in (2, 4)),
    ("dpm_solver_pp", {"order": 3, "variant": "public"}),
    ("dpm_solver_pp", {"order": 2, "lower_order_final": "never"}),
    *(("dpm_solver_pp", {"order": order, "method": "singlestep"}) for order in (2, 3)),
    *(("deis", {"order": order}) for order in (2, 3, 4)),
    *(("deis", {"order": 3, "variable": variable}) for variable in ("rho", "lam")),
    *(("lms", {"order": order}) for order in (2, 4)),
    *(("ipndm", {"order": order, "variant": "public"}) for order in (2, 4)),
    *(("pndm", {"variant": variant}) for variant in ("rho", "public")),
    "f_pndm",
    *(("ghvb", {"order": order}) for order in (1.8, 2.8, 3.8)),
    *(("heavy_ball", {"order": order}) for order in (2, 4)),
    *(("unipc", {"order": order}) for order in (1, 2, 3)),
    *(("unipc", {"order": 2, "variant": variant}) for variant in ("bh1", "lagrange")),
    ("unipc", {"order": 3, "corrector": False}),
    ("unipc", {"order": 2, "prediction": "noise"}),
    ("dc_solver", {"compensation": 1.05}),
    ("dpm_solver_v3", {"order": 2, "corrector": True}),
    ("edm", {"s_churn": 0.0}),
    *(("edm", {"s_churn": churn}) for churn in (5.0, 20.0)),
    ("edm", {"heun": False, "s_churn": 5.0}),
    *(("ddim", {"eta": eta}) for eta in (0.0, 0.5, 1.0)),
    *(("euler_ancestral", {"eta": eta}) for eta in (0.5, 1.0)),
    "dpm2_ancestral",
    "dpmpp_2s_ancestral",
    *(("dpm_solver_pp_sde", {"order": order}) for order in (1, 2, 3)),
    ("dpm_solver_pp_sde", {"order": 2, "eta": 0.5}),
    *(("er_sde", {"order": order}) for order in (1, 2, 3)),
    *(("sa_solver", {"predictor": p, "corrector": c}) for p, c in ((2, 0), (2, 2), (3, 3))),
    ("sa_solver", {"predictor": 3, "corrector": 3, "tau": 0.5}),
    "restart",
]


def get_config():
    config = default()
    config.title = "Solvers on a mixture of eight Gaussians, variance-preserving path"
    config.process = ("vp", {})
    angles = np.arange(8) * np.pi / 4
    config.weights = (1, 2, 1, 2, 1, 2, 1, 2)
    config.means = tuple((float(np.cos(a)), float(np.sin(a))) for a in angles)
    config.covs = (0.01, 0.04) * 4
    config.solvers = tuple(SOLVERS)
    config.grids = ("uniform", "quadratic", "logsnr", "edm_rho")
    config.nfe = (5, 10, 20, 50)
    config.seeds = (0, 1, 2)
    config.samples = 1024
    return config
