"""The names a config may choose components by, and what they stand for; imports nothing until one is built."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

from jaxdiff.near import near

__all__ = ["NAMES", "TARGETS", "TIMES", "WEIGHTINGS", "ConfigError", "near", "resolve"]


class ConfigError(ValueError):
    """A config field with a wrong name, value or type; the message is one line."""


# component -> name -> "module:attribute", resolved late
NAMES: dict[str, dict[str, str]] = {
    "process": {
        name: f"jaxdiff.process:{name}" for name in ("linear", "vp", "ddpm", "cosine", "trig", "subvp", "ve", "edm")
    },
    "network": {
        "mlp": "jaxdiff.network:MLP",
        "unet": "jaxdiff.network:UNet",
        "dit": "jaxdiff.network:make_dit",
    },
    "solver": {
        name: f"jaxdiff.solver:{name}"
        for name in (
            "euler ddim ancestral ddpm heun edm dpm_solver dpm_solver_pp conjugate dc_solver deis dpm2 dpm_solver_v3 exp_rk "
            "f_pndm ghvb heavy_ball ipndm lms pndm rho_rk rk4 unipc usf velocity_ab "
            "euler_ancestral dpm2_ancestral dpmpp_2s_ancestral dpm_solver_pp_sde er_sde sa_solver restart euler_maruyama "
            "predictor_corrector"
        ).split()
    },
    "grid": {
        name: f"jaxdiff.solver.grid:{name}"
        for name in (
            "uniform power quadratic cosine shift logsnr edm_rho arctan ays beta cosmap discrete dynamic_shift exponential "
            "polyexponential vp"
        ).split()
    },
    "guidance": {name: f"jaxdiff.guidance:{name}" for name in ("cfg", "cfg_rescale", "cfg_pp")} | {"none": ""},
    "optimiser": {name: f"jaxdiff.train.optimiser:{name}" for name in ("adam", "adamw", "lion", "muon", "sgd")},
    "noise": {"gaussian": "jaxdiff.process:Gaussian", "student_t": "jaxdiff.process:student_t"},
}
TARGETS = ("data", "noise", "vpred", "velocity", "score", "edm")
TIMES = ("uniform", "logit_normal", "log_normal", "mode", "cosmap", "discrete")
WEIGHTINGS = ("flat", "snr", "min_snr", "p2", "edm", "sigmoid", "likelihood")


@functools.cache
def resolve(kind: str, name: str) -> Callable:
    """The constructor of component ``name``; raises ConfigError for a name that ``kind`` does not have."""
    if name not in NAMES[kind]:
        raise ConfigError(f"{kind}: {name!r} is unknown; allowed: {', '.join(NAMES[kind])}{near(name, NAMES[kind])}")
    module, _, attribute = NAMES[kind][name].partition(":")
    return getattr(importlib.import_module(module), attribute)
