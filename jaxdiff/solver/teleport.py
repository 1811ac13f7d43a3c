"""Gaussian teleport: the closed-form probability flow of Gaussian data from the prior down to where data stops
looking Gaussian, then any table from there (2303.02490 [216])."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.exact import Gaussian
from jaxdiff.process.process import Process
from jaxdiff.solver.algebra import plain_block
from jaxdiff.solver.executor import run
from jaxdiff.solver.streams import check_key, sample_indices, sample_keys
from jaxdiff.solver.table import Table

__all__ = ["Moments", "data_moments", "teleport", "teleport_sample"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Data mean and covariance ``U diag(l - rest) U^T + rest I``, flattened over a sample's axes (n elements).

    ``mean`` (n,), ``basis`` U (n, r) orthonormal columns, ``spectrum`` l (r,) variances along them, ``rest`` () the
    variance of every other direction. Leaves may carry a leading class axis to be indexed before use.
    """

    mean: Any
    basis: Any
    spectrum: Any
    rest: Any


def data_moments(x: Any, *, rank: int | None = None) -> Moments:
    """Mean and covariance of data ``x`` (B, ...) as :class:`Moments` with ``rank`` directions (default: all that B
    samples have).

    ``rest`` is the mean variance of the directions left out, so that the total variance is the sample's. float64, on
    the host, by SVD.
    """
    flat = np.reshape(np.asarray(x, np.float64), (np.shape(x)[0], -1))
    count, size = flat.shape
    if count < 2 or not np.all(np.isfinite(flat)):
        raise ValueError(f"x: shape {np.shape(x)} given; data_moments() needs at least 2 finite samples")
    most = min(count - 1, size)
    rank = most if rank is None else rank
    if not 0 <= rank <= most:
        raise ValueError(f"rank: {rank} given; need 0..{most} for {count} samples of {size} elements")
    mean = flat.mean(0)
    _, scale, basis = np.linalg.svd(flat - mean, full_matrices=False)
    variance = scale**2 / count
    left = float(np.sum(variance[rank:]))
    return Moments(mean, basis[:rank].T, variance[:rank], np.float64(left / max(size - rank, 1)))


def _of(world: Moments | Gaussian) -> Moments:
    return Moments(world.mean, world.basis, world.spectrum, np.float64(0.0)) if isinstance(world, Gaussian) else world


def _shrink(rest: Any, t: tuple, s: tuple) -> Any:
    """``sqrt((alpha_s^2 l + sigma_s^2)/(alpha_t^2 l + sigma_t^2))``."""
    return jnp.sqrt((s[0] ** 2 * rest + s[1] ** 2) / (t[0] ** 2 * rest + t[1] ** 2))


def teleport(process: Process, world: Moments | Gaussian, x: Any, table: Table, *, time: float | None = None) -> Any:
    """Carry states ``x`` (B, ...) from ``time`` (default t_max) to the first point of ``table``, as if the data were
    Gaussian.

    ``x_s = alpha_s mu + U diag(sqrt((alpha_s^2 l + sigma_s^2)/(alpha_t^2 l + sigma_t^2))) U^T (x_t - alpha_t mu)``;
    directions outside U shrink with ``l = rest``. No evaluations. Exact on Gaussian data; on real data the error
    vanishes while the noise outweighs its structure (rho about 2-20 for images of unit scale). ``run(table, d,
    teleport(...), key)`` finishes the sample. Raises ValueError for non-Gaussian noise, sizes that differ from
    ``world`` and a table that starts above ``time``.
    """
    if not process.noise.gaussian:
        raise ValueError(f"process: noise law {process.noise.name!r} given; teleport() needs 'gaussian'")
    block, world = plain_block(table), _of(world)
    c = process.coefficients(np.float64(process.t_max if time is None else time))
    t = (float(c.alpha), float(c.sigma))
    s = (float(block.start[0]), float(block.start[1]))
    if s[1] * t[0] > t[1] * s[0] * (1 + 1e-9):
        raise ValueError(f"table: starts at alpha, sigma = {s}, noisier than the states to carry, {t}")
    x = jnp.asarray(x)
    flat = jnp.reshape(x, (x.shape[0], -1))
    if flat.shape[1:] != np.shape(world.mean):
        raise ValueError(f"x: samples of {flat.shape[1]} elements given; world has {np.shape(world.mean)}")
    mean, basis, spectrum, rest = (
        jnp.asarray(v, flat.dtype) for v in (world.mean, world.basis, world.spectrum, world.rest)
    )
    z = flat - t[0] * mean
    other = _shrink(rest, t, s)
    along = jnp.einsum("bi,ir->br", z, basis, precision="highest") * (_shrink(spectrum, t, s) - other)
    out = s[0] * mean + other * z + jnp.einsum("br,ir->bi", along, basis, precision="highest")
    return jnp.reshape(out, x.shape)


def teleport_sample(
    process: Process,
    world: Moments | Gaussian,
    table: Table,
    d: Any,
    key: jax.Array,
    shape: tuple[int, ...],
    *,
    index: Any = None,
) -> Any:
    """Samples of ``shape`` (B, ...): prior at t_max, :func:`teleport` to the table's first point, the table.
    jit-able.

    Noise as in :func:`sample`: a function of the key and the global sample ``index`` only, so the start of sample i
    is the one it has there.
    """
    check_key(key)
    index = sample_indices(index, shape[0])
    dtype = jnp.zeros(()).dtype
    z = jax.vmap(lambda k: process.noise.sample(k, tuple(shape[1:]), dtype))(sample_keys(key, index))
    start = float(process.coefficients(np.float64(process.t_max)).sigma) * z
    return run(table, d, teleport(process, world, start, table), key, index=index)
