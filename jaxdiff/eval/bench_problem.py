"""What a solver benchmark is held against: a denoiser, the true end point of every start, the true distribution.

The probability flow of an exact world is followed in float64 with fourth-order steps; a trained network by a tight float32
solve. Either reports how far it is from the same solve with half the steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import exact, guidance, prediction
from jaxdiff.metric import FeatureNetwork
from jaxdiff.process.process import Process
from jaxdiff.solver import dpm_solver_pp, run, sample_keys
from jaxdiff.solver.grid import Grid, explicit, from_times
from jaxdiff.solver.table import Table, device

__all__ = ["Problem", "Reference", "mixture_problem", "starts", "tight_grid", "tight_solve"]


class Reference(NamedTuple):
    """End points (N, ...) of N starts, and the RMS distance to the same solve with half the steps."""

    ends: np.ndarray
    error: float


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A sampling problem with known answers.

    ``identity``: text that differs between problems (their parameters), so that finished parts of another problem are
    not taken for this one's. ``denoiser(scale)``: the denoiser at a guidance scale (None: unguided). ``labels(index)``:
    conditions of global sample indices, or None. ``reference(z, labels, scale)``: true end points of unit-scale starts z
    (N, ...). ``draws(count, scale)``: points of the true distribution. ``moments``: its exact mean (D,) and covariance
    (D, D), or None to estimate them from ``draws``. ``network`` and ``heldout``: features and real images of the Frechet
    distance, or None.
    """

    name: str
    identity: str
    process: Process
    shape: tuple[int, ...]
    denoiser: Callable[[float | None], Any]
    labels: Callable[[np.ndarray], Any] | None
    reference: Callable[[np.ndarray, Any, float | None], Reference]
    draws: Callable[[int, float | None], np.ndarray]
    moments: tuple[np.ndarray, np.ndarray] | None = None
    network: FeatureNetwork | None = None
    heldout: np.ndarray | None = None


def starts(process: Process, seed: int, index: np.ndarray, shape: tuple[int, ...]) -> jax.Array:
    """Unit-scale starts (N, ...) of the samples with global indices ``index``: those of ``solver.sample(key(seed))``."""
    return _starts(process.noise, jax.random.key(seed), jnp.asarray(index, jnp.uint32), shape)


@jax.jit(static_argnums=3)
def _starts(law: Any, key: jax.Array, index: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.vmap(lambda k: law.sample(k, shape, jnp.float32))(sample_keys(key, index))


def tight_grid(process: Process, steps: int, reach: float, beyond: bool) -> Grid:
    """``steps`` steps equal in half log-SNR within ``[-reach, reach]`` (or the path's own ends), and the exact ends.

    ``beyond``: go on below the least noise of a path that stops above 0 (ve), where only an exact world can be asked.
    """
    first = max(-reach, float(process.half_log_snr(np.float64(process.t_max))))
    last = reach
    if not process.path.clean:
        last = min(last, float(process.half_log_snr(np.float64(0.0))))
    times = np.asarray(process.time(np.linspace(first, last, steps)), np.float64)
    times = np.clip(times, 0.0, process.t_max)
    if times[0] < process.t_max * (1 - 1e-9):  # where alpha(t_max) = 0, half log-SNR has no first value
        times = np.append(process.t_max, times)
    else:
        times[0] = process.t_max
    if process.path.clean and times[-1] > 0:
        times = np.append(times, 0.0)
    keep = np.append(True, np.diff(times) < 0)
    grid = from_times(process, times[keep])
    if not process.path.appends_clean:
        return grid
    alpha, sigma, time = grid.alpha, grid.sigma, grid.time
    if beyond:
        extra = sigma[-1] * np.exp(-np.diff(np.log(alpha / sigma))[-1] * np.arange(1, steps))
        extra = extra[extra > np.exp(-reach)]
        sigma = np.append(sigma, extra)
    ones = np.ones(len(sigma) + 1 - len(alpha))
    return explicit(np.append(alpha, ones), np.append(sigma, 0.0), np.append(time, 0 * ones))


@jax.jit
def _solve(table: Table, d: Any, z: jax.Array, cond: Any) -> jax.Array:
    d = d if cond is None else prediction.condition(d, cond)
    return run(table, d, table.blocks.start_scale * z)


def tight_solve(
    process: Process, d: Any, z: np.ndarray, cond: Any = None, *, steps: int, reach: float, double: bool
) -> Reference:
    """The probability flow from unit-scale starts ``z`` by third- or fourth-order steps, with its own error.

    ``double``: in float64 with order 4 (exact worlds); else in the network's float32 with order 3. The error is the RMS
    distance between ``steps`` and ``steps // 2``.
    """
    ends = []
    with jax.enable_x64(True) if double else contextlib.nullcontext():
        for count in (steps // 2, steps):
            table = dpm_solver_pp(
                process,
                tight_grid(process, count, reach, double),
                order=4 if double else 3,
                variant="lagrange",
                lower_order_final="never",
            )
            start = jnp.asarray(z, jnp.float64 if double else jnp.float32)
            ends.append(np.asarray(_solve(device(table, hooks=False), prediction.lift(d), start, cond), np.float64))
    return Reference(ends[1], float(np.sqrt(np.mean((ends[1] - ends[0]) ** 2))))


def _digest(tree: Any) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree_util.tree_leaves(tree):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def mixture_problem(
    process: Process,
    world: Any,
    *,
    labels: bool = False,
    guidance_name: str = "cfg",
    steps: int = 1000,
    seed: int = 10_000,
) -> Problem:
    """An exact world as a problem: float64 end points, exact draws and moments.

    ``labels``: samples take the mixture's classes in turn, and guidance scales apply. A guided distribution has no closed
    form: its draws are tight solves, its moments those of the draws.
    """
    dimension = int(world.dimension)
    plain = exact.denoiser(world, process)
    classes: Any = np.unique(np.asarray(world.labels)) if labels else None

    def denoiser(scale: float | None) -> Any:
        if scale is None:
            return plain
        if classes is None:
            raise ValueError(f"guidance_scales: {scale} given, but the world is used without labels")
        make: Any = guidance.GUIDANCES[guidance_name]
        return make(plain, scale, null=jnp.int32(-1))

    def label(index: np.ndarray) -> np.ndarray:
        return classes[np.asarray(index) % len(classes)].astype(np.int32)

    def reference(z: np.ndarray, cond: Any, scale: float | None) -> Reference:
        return tight_solve(process, denoiser(scale), z, cond, steps=steps, reach=12.0, double=True)

    def draws(count: int, scale: float | None) -> np.ndarray:
        if classes is None:
            return np.asarray(world.sample(jax.random.key(seed), count), np.float64)
        index = np.arange(count)
        return reference(np.asarray(starts(process, seed, index, (dimension,))), label(index), scale).ends

    exact_moments: Any = None if classes is not None else tuple(np.asarray(m, np.float64) for m in world.moments())
    return Problem(
        name="mixture",
        identity=f"{process!r} {_digest(world)} labels={labels} {guidance_name} steps={steps} seed={seed}",
        process=process,
        shape=(dimension,),
        denoiser=denoiser,
        labels=None if classes is None else label,
        reference=reference,
        draws=draws,
        moments=exact_moments,
    )
