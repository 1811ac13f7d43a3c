"""Learn every kind of table on the mixture world and write docs/learned-solvers.md.

    python experiments/learned_solvers/run.py          # two minutes on two CPU cores

Every learner sees the same 512 starts (DC-Solver 64, least squares 256, Align Your Steps 1,024 data points) and is judged on
2,048 others by the RMS distance of the run's end from that of Heun in 200 steps (grid of the same kind). Rows are
(process, name of the case); ``measure`` runs one.
"""

import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import exact, process, solver
from jaxdiff.solver import grid, learn

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "learned-solvers.md"
WORLD = exact.GaussianMixture(
    [0.4, 0.6], [[-1.0, 0.5], [0.8, -0.3]], [[[0.2, 0.05], [0.05, 0.1]], [[0.1, 0.0], [0.0, 0.3]]]
)
# process: (path, its usual grid)
PATHS = {
    "linear": (process.linear(), grid.uniform),
    "edm": (process.edm(), grid.edm_rho),
}


@functools.cache
def problem(path):
    """Denoiser, reference table, starts and ends to learn from, and the error of a table on held-out starts."""
    p, make = PATHS[path]
    d, reference = exact.denoiser(WORLD, p), solver.heun(p, make(p, 200))
    x = jax.random.normal(jax.random.key(0), (512 + 2048, 2)) * reference.blocks.start_scale
    target = jax.jit(lambda x: solver.run(reference, d, x))(x)
    error = jax.jit(lambda table, x, target: jnp.sqrt(jnp.mean((solver.run(table, d, x) - target) ** 2)))
    judge = lambda table, part: float(error(solver.device(table), x[part], target[part]))
    return d, reference, x[:512], target[:512], judge


LEARN, HELD_OUT = slice(0, 512), slice(512, None)


def endpoint(path, base):
    """Times and coefficients freely, on the endpoint."""
    d, _, x, target, _ = problem(path)
    return learn.endpoint(base, d, x, target, records=3, steps=600, rate=2e-2)


def bespoke(path, base):
    """Scale and clock, on the bound."""
    d, reference, x, _, _ = problem(path)
    return learn.bespoke(base, d, x, reference, steps=600, rate=1e-2)


def scale_time(path, base):
    """Scale and clock, on the endpoint."""
    d, _, x, target, _ = problem(path)
    return learn.endpoint(learn.scale_time(base, PATHS[path][0]), d, x, target, steps=600, rate=1e-2)


def ratios(path, steps):
    """The family of DC-Solver."""
    p, make = PATHS[path]
    return learn.compensated(p, make(p, steps))


def dc(path, base):
    """Ratios, one after the other."""
    d, reference, x, _, _ = problem(path)
    return learn.dc(ratios(path, base.rows), d, x[:64], reference)


def dc_endpoint(path, base):
    """Ratios, on the endpoint."""
    d, _, x, target, _ = problem(path)
    return learn.endpoint(ratios(path, base.rows), d, x, target, steps=300, rate=2e-2)


def least_squares(path, base, **options):
    """Coefficients row by row."""
    d, reference, x, _, _ = problem(path)
    return learn.least_squares(base, d, x[:256], reference, **options)


def local_steps(path, base, **options):
    """Coefficients row by row, towards ten steps of Heun from each state."""
    d, _, x, _, _ = problem(path)
    times = np.asarray(base.time)
    fine = np.append((times[:-1, None] + np.diff(times)[:, None] * np.arange(10) / 10).ravel(), times[-1])
    return learn.least_squares(base, d, x[:256], solver.heun(PATHS[path][0], fine), local=True, **options)


def ays(path, base, maker, **options):
    """Noise levels."""
    d, _, _, _, judge = problem(path)
    points = grid.logsnr(PATHS[path][0], base.rows)
    if options.get("sweeps"):
        options["judge"] = lambda table: judge(table, LEARN)
    return learn.klub(maker, points, d, WORLD.sample(jax.random.key(5), (1024,)), **options)


P = functools.partial
usual = lambda maker, steps, **options: lambda p, make: maker(p, make(p, steps), **options)
levels = lambda maker, steps: lambda p, make: maker(p, grid.logsnr(p, steps))
# (base, learner): table to start from, what learns
CASES = {
    ("DPM-Solver++ 2M", "endpoint: times and three records"): (usual(solver.dpm_solver_pp, 6), endpoint),
    ("Euler", "bespoke: bound"): (usual(solver.euler, 6), bespoke),
    ("Euler", "scale and clock: endpoint"): (usual(solver.euler, 6), scale_time),
    ("midpoint", "bespoke: bound"): (usual(learn.midpoint, 5), bespoke),
    ("midpoint", "scale and clock: endpoint"): (usual(learn.midpoint, 5), scale_time),
    ("UniPC-2", "DC: step by step"): (usual(solver.unipc, 8), dc),
    ("UniPC-2", "DC ratios: endpoint"): (usual(solver.unipc, 8), dc_endpoint),
    ("DDIM", "least squares: two records"): (usual(solver.ddim, 8), P(least_squares, records=2)),
    ("DDIM", "least squares, local: two records"): (usual(solver.ddim, 8), P(local_steps, records=2)),
    ("DDIM", "least squares: four records"): (usual(solver.ddim, 8), P(least_squares, records=4)),
    ("DDIM", "least squares: two states, three records"): (
        usual(solver.ddim, 8),
        P(least_squares, records=3, states=2, train=("A", "B")),
    ),
    ("Heun in rho", "least squares: three records"): (
        usual(solver.heun, 6, clock="rho"),
        P(least_squares, records=3),
    ),
    ("DDIM, uniform log-SNR", "AYS: one sweep"): (levels(solver.ddim, 10), P(ays, maker=solver.ddim)),
    ("DPM-Solver++ 2M, uniform log-SNR", "AYS: one sweep"): (
        levels(solver.dpm_solver_pp, 10),
        P(ays, maker=solver.dpm_solver_pp),
    ),
    ("DPM-Solver++ 2M, uniform log-SNR", "AYS: judged sweeps"): (
        levels(solver.dpm_solver_pp, 10),
        P(ays, maker=solver.dpm_solver_pp, sweeps=10),
    ),
    ("DPM-Solver++ 2M, uniform log-SNR", "AYS: least bound"): (
        levels(solver.dpm_solver_pp, 10),
        P(ays, maker=solver.dpm_solver_pp, sweeps=None),
    ),
}
HEAD = ["process", "base", "learner", "NFE", "before", "after", "gain", "CPU seconds"]
TEXT = """# Learned solvers

Written by `experiments/learned_solvers/run.py`; do not edit. World: a two-component mixture in two dimensions with its exact
denoiser. *before*, *after*: RMS distance of the run's end from Heun's in 200 steps, on 2,048 held-out starts. Grids: uniform in
time on the linear path, edm_rho on edm, unless the base says uniform log-SNR. *learner*: what moves, and after the colon the
criterion or the history. *CPU seconds*: processor time of all threads, compilation included, of one run; a scale, no
benchmark. *local*: each step is fitted to ten steps of Heun from its own start. Step-by-step learners (DC, least squares) draw
nothing; a gain below 1 is a loss, and the last row of each process is one to be expected: the grid of least bound is not the
best grid.

"""


def measure(path, name):
    """One line of the page, ``name`` of CASES: its cells."""
    base_of, learner = CASES[name]
    p, make = PATHS[path]
    base = base_of(p, make)
    judge = problem(path)[-1]
    start = time.process_time()
    found = learner(path, base)
    seconds = time.process_time() - start
    before, after = judge(base, HELD_OUT), judge(found.table, HELD_OUT)
    cells = [path, *name, str(int(found.table.nfe))]
    return [*cells, f"{before:.4f}", f"{after:.4f}", f"{before / after:.1f}", f"{seconds:.1f}"]


def page(rows):
    """The Markdown page."""
    lines = ["| " + " | ".join(cells) + " |" for cells in [HEAD, ["---"] * len(HEAD), *rows]]
    return TEXT + "\n".join(lines) + "\n"


def main():
    """Measure all and write."""
    rows = []
    for path in PATHS:
        for name in CASES:
            rows.append(measure(path, name))
            print(" | ".join(rows[-1]), flush=True)
    PAGE.write_text(page(rows))
    print(f"wrote {PAGE}: {len(rows)} tables")


if __name__ == "__main__":
    main()
