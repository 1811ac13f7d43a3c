"""How data is corrupted: coefficient path, noise law, basis, endpoint, domain.

``linear``, ``vp``, ``ddpm``, ``cosine`` (alias ``trig``), ``subvp``, ``ve``, ``edm`` build a :class:`Process`;
each takes the path's parameters plus ``noise=`` and ``t_max=``. ``PROCESSES`` lists them by config name. ``per_leaf`` is a
process for each array of data that is a tree.
"""

from __future__ import annotations

from typing import Any

from jaxdiff.process import exploding, preserving, straight, trigonometric
from jaxdiff.process.coefficients import Coefficients, expand, leaf, resolve
from jaxdiff.process.geometry import Absent, Euclidean, Identity
from jaxdiff.process.noise import LAWS, Gaussian, StudentT, student_t
from jaxdiff.process.per_leaf import JointLaw, PerLeaf, per_leaf
from jaxdiff.process.process import Process

__all__ = [
    "LAWS",
    "PROCESSES",
    "Absent",
    "Coefficients",
    "Euclidean",
    "Gaussian",
    "Identity",
    "JointLaw",
    "PerLeaf",
    "Process",
    "StudentT",
    "cosine",
    "ddpm",
    "edm",
    "expand",
    "leaf",
    "linear",
    "per_leaf",
    "resolve",
    "student_t",
    "subvp",
    "trig",
    "ve",
    "vp",
]


def _process(path: Any, noise: Any, t_max: float) -> Process:
    if not 0 < t_max <= 1:
        raise ValueError(f"t_max: {t_max} given; need 0 < t_max <= 1")
    if isinstance(noise, type) or not (noise is None or hasattr(noise, "sample")):
        raise ValueError(f"noise: {noise!r} given; need a law, Gaussian() or student_t(df)")
    return Process(path, Gaussian() if noise is None else noise, t_max=float(t_max))


def linear(sigma_min: Any = 0.0, *, noise: Any = None, t_max: float = 1.0) -> Process:
    """Rectified flow / flow matching: ``alpha = 1 - t``, ``sigma = sigma_min + (1 - sigma_min) t`` [5]."""
    return _process(straight.make(sigma_min), noise, t_max)


def vp(beta_min: Any = 0.1, beta_max: Any = 20.0, *, noise: Any = None, t_max: float = 1.0) -> Process:
    """Variance preserving with linear beta: ``alpha = exp(-int beta/2)``, ``sigma^2 = 1 - alpha^2`` (2011.13456)."""
    return _process(preserving.make_vp(beta_min, beta_max), noise, t_max)


def ddpm(
    steps: int = 1000,
    schedule: Any = "linear",
    *,
    zero_terminal_snr: bool = False,
    noise: Any = None,
    t_max: float = 1.0,
) -> Process:
    """The discrete chain of DDPM on times ``i/steps`` (2006.11239 [131]); ``schedule`` a name ("linear", "scaled_linear",
    "cosine") or betas (T,), the last of which may be 1.

    ``zero_terminal_snr``: ``alpha_i <- (alpha_i - alpha_T) alpha_1/(alpha_1 - alpha_T)``, which ends at 0 (2305.08891).
    Raises ValueError for another name, betas outside (0, 1), and such an end of a single step.
    """
    return _process(preserving.make_ddpm(steps, schedule, zero_terminal_snr), noise, t_max)


def cosine(offset: Any = 0.0, shift: Any = 0.0, *, noise: Any = None, t_max: float = 1.0) -> Process:
    """Cosine path; offset 0 is ``cos, sin(pi t/2)``, 0.008 iDDPM's; ``shift`` is added to half_log_snr."""
    return _process(trigonometric.make(offset, shift), noise, t_max)


trig = cosine


def subvp(beta_min: Any = 0.1, beta_max: Any = 20.0, *, noise: Any = None, t_max: float = 1.0) -> Process:
    """Sub-variance-preserving: VP's alpha, ``sigma = 1 - alpha^2`` (2011.13456)."""
    return _process(preserving.make_subvp(beta_min, beta_max), noise, t_max)


def ve(sigma_min: Any = 0.01, sigma_max: Any = 50.0, *, noise: Any = None, t_max: float = 1.0) -> Process:
    """Variance exploding, ``sigma = sigma_min (sigma_max/sigma_min)^t`` (2011.13456)."""
    return _process(exploding.make_ve(sigma_min, sigma_max), noise, t_max)


def edm(sigma_min: Any = 0.002, sigma_max: Any = 80.0, *, noise: Any = None, t_max: float = 1.0) -> Process:
    """EDM: ``alpha = 1``, ``sigma = sigma_max t`` (2206.00364)."""
    return _process(exploding.make_edm(sigma_min, sigma_max), noise, t_max)


PROCESSES = {
    "linear": linear,
    "vp": vp,
    "ddpm": ddpm,
    "cosine": cosine,
    "trig": trig,
    "subvp": subvp,
    "ve": ve,
    "edm": edm,
}
