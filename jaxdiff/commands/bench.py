"""`jaxdiff bench`: a config becomes a problem with known answers, every solver runs on it, a folder reports."""

from __future__ import annotations

import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxdiff import exact
from jaxdiff.commands import assemble, draw
from jaxdiff.config import ConfigError, resolve
from jaxdiff.eval import bench_report, default_network
from jaxdiff.eval.bench import Result, benchmark
from jaxdiff.eval.bench_problem import Problem, Reference, mixture_problem, starts, tight_solve

__all__ = ["problem", "run", "run_problem"]

SEED = 10_000  # of the true distribution's draws, apart from any cell's


def problem(config: ConfigDict) -> Problem:
    """The problem a checked config names."""
    if config.world == "run":
        return run_problem(config)
    name, options = config.process
    labels = np.asarray(config.labels, np.int64) if len(config.labels) else None
    world = exact.GaussianMixture(config.weights, config.means, config.covs, labels=labels)
    return mixture_problem(
        resolve("process", name)(**options),
        world,
        labels=labels is not None,
        guidance_name=config.guidance,
        steps=config.reference_steps,
        seed=SEED,
    )


def run_problem(config: ConfigDict) -> Problem:
    """A trained run as a problem: its truth is a tight solve of its own probability flow, with labels in turn.

    Frechet distances are to the held-out images, in the features `jaxdiff eval` uses. Denoisers of each scale are made once.
    """
    made, params, _ = draw.load_run(config.workdir, {})
    plain = assemble.denoiser(made, params)
    known: dict[float | None, Any] = {}

    def denoiser(scale: float | None) -> Any:
        if scale not in known:
            known[scale] = plain if scale is None else assemble.guided(made, plain, config.guidance, scale)
        return known[scale]

    def labels(index: np.ndarray) -> np.ndarray:
        return (np.asarray(index) % made.num_classes).astype(np.int32)

    def reference(z: np.ndarray, cond: Any, scale: float | None) -> Reference:
        ends, errors = [], []
        size = min(256, len(z))
        for first in range(0, len(z), size):
            # the last batch is filled up: another shape would compile again
            pick = np.minimum(np.arange(first, first + size), len(z) - 1)
            part = None if cond is None else jnp.asarray(np.asarray(cond)[pick])
            found = tight_solve(
                made.process, denoiser(scale), z[pick], part, steps=config.reference_steps, reach=7.0, double=False
            )
            ends.append(found.ends[: len(z) - first])
            errors.append(found.error**2)
        return Reference(np.concatenate(ends), float(np.sqrt(np.mean(errors))))

    def draws(count: int, scale: float | None) -> np.ndarray:
        index = np.arange(count)
        z = np.asarray(starts(made.process, SEED, index, made.shape))
        return reference(z, labels(index) if made.num_classes else None, scale).ends

    images = len(made.shape) == 3
    # what the samples depend on: a field added to another section must not discard finished parts
    kept = {name: made.config[name].to_dict() for name in ("process", "network", "guidance")}
    kept["target"], kept["sigma_data"] = made.config.objective.target, made.config.objective.sigma_data
    return Problem(
        name=f"run {pathlib.Path(config.workdir).name}",
        identity=f"{draw.fingerprint(params)} {kept} {config.guidance} {config.reference_steps}",
        process=made.process,
        shape=made.shape,
        denoiser=denoiser,
        labels=labels if made.num_classes else None,
        reference=reference,
        draws=draws,
        network=default_network(made.shape) if images else None,
        heldout=assemble.dataset(made.config, made.config.data.heldout).examples()["x0"] if images else None,
    )


def run(config: ConfigDict, out: str) -> Result:
    """Benchmark and write the folder ``out``; prints where and how many compilations it took."""
    folder = pathlib.Path(out)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out: {out} is a file; give a folder")
    result = benchmark(
        problem(config),
        solvers=config.solvers,
        grids=config.grids,
        nfe=config.nfe,
        seeds=config.seeds,
        guidance_scales=config.guidance_scales,
        samples=config.samples,
        batch=config.batch,
        chunk=config.chunk,
        projections=config.projections,
        reference_samples=config.reference_samples,
        timing=config.timing,
        out=folder,
    )
    bench_report.write(result, folder, config=_plain(config), title=config.title)
    facts = result.facts
    print(
        f"{folder}: {facts['run']} cells of {facts['solvers']} solvers ({facts['refused']} refused), "
        f"{facts['programs_compiled']} programs compiled for {facts['buckets']} buckets, "
        f"{facts['wall_seconds']:.1f} s"
    )
    return result


def _plain(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON values."""
    as_list = lambda v: v.tolist() if isinstance(v, np.ndarray) else v
    return {name: as_list(value) for name, value in config.items()}
