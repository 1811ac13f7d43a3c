"""Anytime sampling: every outer step's data estimate is a sample, of a short inner run from the current state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import prediction
from jaxdiff.guidance.mix import ask
from jaxdiff.prediction import Prediction, Query, lift
from jaxdiff.process.coefficients import expand
from jaxdiff.process.process import Process
from jaxdiff.solver.executor import run
from jaxdiff.solver.streams import check_key
from jaxdiff.solver.table import Table, blocks_of, stack

__all__ = ["Nested", "nested"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Nested:
    """``inner`` run from the state to clean data at every call; build with :func:`nested`."""

    inner: Any
    tables: Table
    times: Any
    key: Any
    index: Any

    @property
    def process(self) -> Any:
        """The inner denoiser's process, None for plain functions."""
        return getattr(self.inner, "process", None)

    def __call__(self, x: Any, t: Any, r: Any = None) -> Prediction:
        """Predict at state ``x`` (B, ...) and ``t``, the time of a row of the outer table."""
        return ask(self, x, t, r)

    def start(self, x: Any) -> jax.Array:
        """How many outer rows have been asked, once a sample."""
        return jnp.zeros(x.shape[0], jnp.uint32)

    def step(self, count: Any, x: Any, query: Query) -> tuple:
        """``(prediction, count + 1)``: the inner run's end as data, ``(x - alpha data)/sigma`` as noise.

        NaN when asked at a time that is not one of the outer table's.
        """
        gap = jnp.abs(jnp.asarray(self.times, jnp.result_type(query.t, jnp.float32)) - query.t)
        k = jnp.argmin(gap)
        table = jax.tree.map(lambda v: jnp.asarray(v)[k], self.tables)
        if self.key is None:
            data = run(table, self.inner, x)
        else:
            data = run(table, self.inner, x, jax.random.fold_in(self.key, count[0]), index=self.index)
        data = jnp.where(gap[k] <= 1e-6, data, jnp.nan)
        alpha, sigma = expand(query.alpha, x), expand(query.sigma, x)
        noise = jnp.where(sigma > 0, (x - alpha * data) / jnp.where(sigma > 0, sigma, 1), 0)
        return Prediction(data, noise), count + 1

    def condition(self, cond: Any) -> Nested:
        """The same, told ``cond``."""
        return dataclasses.replace(self, inner=prediction.condition(self.inner, cond))


def nested(
    d: Any,
    outer: Table,
    inner: Callable[[Process], Table],
    *,
    process: Process | None = None,
    key: jax.Array | None = None,
    index: Any = None,
) -> Nested:
    """Nested diffusion: at every row of ``outer``, ``x0_hat`` is a sample of x0 given x_t by an inner run (2305.19066 [14]).

    ``run(outer, nested(d, outer, inner), x, record=("predictions",))``: each row's ``predictions.data`` is a viable sample, so
    sampling may stop anywhere. With an exact stochastic inner sampler and ``ddim(eta=1)`` outside, the law of the result is
    exact for any number of outer steps; a deterministic inner one is not a posterior sample, and its bias grows with them
    (Gaussian data of variance 0.5: 0.73 after five, 1.10 after twenty). One inner step of ``ddim`` is ``d`` itself. A row costs
    its inner table's evaluations.

    Args:
        d: the denoiser, plain or stateful (its state starts anew in every inner run).
        outer: the table that will run; its rows' times say where the inner runs begin.
        inner: ``inner(process)`` makes the inner table on that process, whose ``t_max`` is the row's time:
            ``lambda p: solver.ddim(p, grid.uniform(p, 5), eta=0.85)``. All inner tables are stacked: equal lengths waste none.
        process: the denoiser's own by default.
        key, index: for inner tables that draw noise: a typed key other than the run's, and the samples' global
            indices (B,), as given to ``sample`` (chunks that shared them would share their noise).

    Raises ValueError for a missing process, key or index.
    """
    d = lift(d)
    process = getattr(d, "process", None) if process is None else process
    if process is None:
        raise ValueError(f"process: missing, and a denoiser of type {type(d).__name__} has none of its own")
    times = np.asarray(outer.tau, np.float64)
    unique = np.unique(times[np.asarray(outer.live)])[::-1]
    if not np.all((unique > 0) & (unique <= process.t_max)):
        raise ValueError(
            f"outer: a row at t = {unique.min():g}..{unique.max():g}; need 0 < t <= t_max = {process.t_max}"
        )
    host = jax.tree.map(lambda v: np.asarray(v, np.float64), process)
    makes = [inner(dataclasses.replace(host, t_max=float(t))) for t in unique]
    _check_starts(outer, makes, unique)
    tables = stack(makes)
    if any(block.stochastic for block in blocks_of(tables)):
        if key is None or index is None:
            raise ValueError(
                f"{'key' if key is None else 'index'}: missing; inner tables that draw noise need a typed key of their own "
                "and the samples' global indices, jnp.arange(B) or those given to sample()"
            )
        check_key(key)
    else:
        key = index = None
    return Nested(d, tables, unique, key, None if index is None else jnp.asarray(index))


def _check_starts(outer: Table, makes: list[Table], times: np.ndarray) -> None:
    """Refuse inner tables that begin at another noise level than the row they belong to."""
    asked = blocks_of(outer)[0]
    for time, table in zip(times, makes):
        k = int(np.argmax(np.asarray(outer.tau) == time))
        begins = blocks_of(table)[0]
        here, there = (
            (float(np.asarray(b.alpha)[i]), float(np.asarray(b.sigma)[i])) for b, i in ((asked, k), (begins, 0))
        )
        if not np.allclose(here, there, rtol=1e-5, atol=1e-6):
            raise ValueError(
                f"inner: its table at t={time:g} begins at (alpha, sigma) = ({there[0]:.6g}, {there[1]:.6g}), the outer "
                f"row is at ({here[0]:.6g}, {here[1]:.6g}); make its grid on the process it is given"
            )
        if float(np.asarray(begins.sigma)[-1]) > 0:
            raise ValueError(f"inner: its table at t={time:g} ends above sigma = 0; make its grid end at clean data")
