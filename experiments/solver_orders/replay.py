"""Compare jaxdiff's tables with the public code of EDM (NVlabs/edm), azula (probabilists/azula) and, for its dpm_fast with
noise, k-diffusion (crowsonkb/k-diffusion), state by state.

Needs torch, and work trees of the repositories, whose own code runs; nothing of theirs is kept here.
"""

import argparse
import ast
import dataclasses
import math
import pathlib
import sys

import jax
import numpy as np
import torch

from jaxdiff import exact, process, solver
from jaxdiff.process.coefficients import Coefficients
from jaxdiff.solver.grid import explicit
from jaxdiff.solver.order import posterior

torch.set_default_dtype(torch.float64)
jax.config.update("jax_enable_x64", True)

WORLD = exact.GaussianMixture([0.35, 0.65], [-1.2, 0.7], [0.3**2, 0.2**2])
UNIT = np.linspace(-1.5, 2.0, 7)  # the start, in units of sigma_0
DRAWS = np.random.default_rng(5).normal(size=(400, UNIT.size))


@dataclasses.dataclass
class Theirs:
    """What a public sampler did: the states it showed the denoiser, with alpha and sigma there, and where it ended."""

    states: list
    end: np.ndarray
    drawn: int


class Watch:
    """The analytic denoiser for torch code, which notes what it is shown, and recorded noise in place of torch's."""

    def __init__(self):
        self.states, self.drawn = [], 0

    def denoise(self, x: torch.Tensor, alpha: float, sigma: float, scale: float = 1.0) -> torch.Tensor:
        """x0_hat at ``x``, noted as ``scale x`` with its levels."""
        alpha, sigma = float(alpha), float(sigma)
        self.states.append((scale * alpha, scale * sigma, scale * x.numpy().copy()))
        return torch.from_numpy(posterior(WORLD, x.numpy(), alpha, sigma)[0])

    def noise(self, x: torch.Tensor) -> torch.Tensor:
        """The next recorded draw."""
        self.drawn += 1
        return torch.from_numpy(DRAWS[self.drawn - 1].copy())


def in_numpy(table: solver.Table, x: np.ndarray, draw_of: dict) -> tuple[list, np.ndarray]:
    """States shown to the denoiser, and the end, row by row in numpy; ``draw_of`` row (-1: churn) -> recorded draw."""
    b = table.blocks
    zero = np.zeros(table.rows)
    p, q, C, E = (zero if v is None else np.asarray(v) for v in (b.p, b.q, b.C, b.E))
    if b.start_noise is not None:
        x = (1.0 if b.start_gain is None else float(b.start_gain)) * x + float(b.start_noise) * DRAWS[draw_of[-1]]
    ys, ds, states = [x] * b.A.shape[1], [np.zeros_like(x)] * b.B.shape[1], []
    for k in range(table.rows):
        states.append((float(b.alpha[k]), float(b.sigma[k]), ys[0]))
        data, noise = posterior(WORLD, ys[0], float(b.alpha[k]), float(b.sigma[k]))
        ds = [p[k] * data + q[k] * noise, *ds[:-1]]
        y = sum(c * v for c, v in zip(b.A[k], ys)) + sum(c * v for c, v in zip(b.B[k], ds)) + E[k]
        ys = [y + (C[k] * DRAWS[draw_of[k]] if C[k] else 0), *ys[:-1]]
    return states, ys[0]


@jax.jit
def _run(table: solver.Table, x: jax.Array, noise: jax.Array, churn: jax.Array) -> jax.Array:
    hook = solver.hooks(noise=lambda keys, row, y: noise[row.k][:, None])
    d, x, key = exact.denoiser(WORLD, process.linear()), x[:, None], jax.random.key(0)
    block = table.blocks
    if block.start_noise is not None:
        # churn before the first row is the executor's own draw: move the start so that it ends where ``churn`` would
        own = solver.begin(table, d, 0 * x, key, jax.numpy.arange(x.shape[0], dtype=jax.numpy.uint32)).y[0]
        x = x + (block.start_noise * churn[:, None] - own) / (1.0 if block.start_gain is None else block.start_gain)
    return solver.run(table, d, x, key, hooks=hook)[:, 0]


def in_jax(table: solver.Table, x: np.ndarray, draw_of: dict) -> np.ndarray:
    """The end of ``solver.run`` in float64 with the recorded noise; the world is asked at the rows' alpha and sigma."""
    return np.asarray(
        _run(table, x, DRAWS[[draw_of.get(k, 0) for k in range(table.rows)]], DRAWS[draw_of.get(-1, 0)])
    )


def compare(table: solver.Table, theirs: Theirs, draw_of: dict, compiled: bool) -> tuple:
    """Largest differences: of the end (in numpy and, if ``compiled``, by solver.run), and of every state evaluated."""
    x = float(table.blocks.start_scale) * UNIT
    states, end = in_numpy(table, x, draw_of)
    final = np.max(np.abs(end - theirs.end))
    if compiled:
        final = max(final, np.max(np.abs(in_jax(table, x, draw_of) - theirs.end)))
    if len(states) != len(theirs.states):
        return final, np.inf
    # sizes above 1, near the start of variance-exploding paths, in units of themselves
    apart = [
        np.max(np.abs(a[2] - b[2])) / max(1.0, a[1])
        + abs(a[0] - b[0]) / max(1.0, a[0])
        + abs(a[1] - b[1]) / max(1.0, a[1])
        for a, b in zip(states, theirs.states)
    ]
    return final, max(apart)


class Report:
    """Rows of the page: a public sampler, ours, how many configurations, and the largest difference of each kind."""

    def __init__(self):
        self.rows: dict = {}

    def add(self, public: str, ours: str, result: tuple) -> None:
        """One configuration."""
        n, final, states = self.rows.get((public, ours), (0, 0.0, 0.0))
        self.rows[public, ours] = (n + 1, max(final, result[0]), max(states, result[1]))

    def write(self) -> None:
        """Print the rows in Markdown."""
        print("| public sampler | jaxdiff | configurations | end | states |\n| --- | --- | --- | --- | --- |")
        for (public, ours), (n, final, states) in self.rows.items():
            print(f"| {public} | {ours} | {n} | {final:.1e} | {states:.1e} |")


# EDM: Algorithm 2, and the general sampler over schedules and scalings


class Ablation:
    """The general sampler's path ``alpha = s(t)``, ``sigma = s(t) sigma(t)`` in the schedule's own time."""

    name, clean, appends_clean = "ablation", True, False

    def __init__(self, schedule: str, scaling: str, beta_d: float, beta_min: float):
        self.schedule, self.scaling, self.beta_d, self.beta_min = schedule, scaling, beta_d, beta_min

    def _level(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.schedule == "linear":
            return t, np.ones_like(t)
        with np.errstate(divide="ignore"):
            if self.schedule == "ve":
                return np.sqrt(t), 0.5 / np.sqrt(t)
            level = np.sqrt(np.expm1(0.5 * self.beta_d * t**2 + self.beta_min * t))
            return level, 0.5 * (self.beta_min + self.beta_d * t) * (level + 1 / level)

    def coefficients(self, t: np.ndarray) -> Coefficients:
        """The path and its tangent."""
        level, slope = self._level(np.asarray(t, np.float64))
        s = 1 / np.sqrt(1 + level**2) if self.scaling == "vp" else np.ones_like(level)
        ds = -level * slope * s**3 if self.scaling == "vp" else np.zeros_like(level)
        return Coefficients(s, s * level, ds, ds * level + s * slope, np.ones_like(level))

    def time(self, lam: np.ndarray) -> np.ndarray:
        """Inverse of the level ``e^-lam``."""
        level = np.exp(-np.asarray(lam, np.float64))
        if self.schedule == "linear":
            return level
        if self.schedule == "ve":
            return level**2
        rise = np.log1p(level**2)
        return 2 * rise / (self.beta_min + np.sqrt(self.beta_min**2 + 2 * self.beta_d * rise))


class Net:
    """The network EDM's samplers see."""

    sigma_min, sigma_max = 0.0, float("inf")

    def __init__(self, watch: Watch, scaling: str):
        self.watch, self.scaling = watch, scaling
        self.round_sigma = torch.as_tensor

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, labels: None = None) -> torch.Tensor:
        """x0_hat at ``x`` of level ``sigma``."""
        scale = 1 / np.sqrt(1 + float(sigma) ** 2) if self.scaling == "vp" else 1.0
        return self.watch.denoise(x, 1.0, sigma, scale)


def edm_functions(folder: pathlib.Path) -> dict:
    """``edm_sampler`` and ``ablation_sampler``, from the syntax tree of generate.py, whose imports are not needed."""
    tree = ast.parse((folder / "generate.py").read_text())
    wanted = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.endswith("_sampler")]
    space: dict = {"torch": torch, "np": np}
    exec(compile(ast.Module(wanted, []), "generate.py", "exec"), space)
    return space


def run_edm(sampler: object, **options: object) -> Theirs:
    """Run one of EDM's samplers on the world from UNIT."""
    watch = Watch()
    end = sampler(
        Net(watch, options.get("scaling", "none")), torch.from_numpy(UNIT.copy()), randn_like=watch.noise, **options
    )
    return Theirs(watch.states, end.numpy(), watch.drawn)


def churn_rows(steps: int, heun: bool) -> dict:
    """Draw i is added before step i: by the last row of step i - 1, or before the first evaluation."""
    return {(2 * i - 1 if heun else i - 1) if i else -1: i for i in range(steps)}


CHURNS = (
    {},
    {"S_churn": 30, "S_min": 0.01, "S_max": 1, "S_noise": 1.007},
    {"S_churn": 80, "S_min": 0.05, "S_max": 50, "S_noise": 1.003},
    {"S_churn": 40},
)


def replay_edm(folder: pathlib.Path, report: Report) -> None:
    """edm_sampler and ablation_sampler."""
    space = edm_functions(folder)
    levels = process.edm()
    for steps in (2, 5, 18):
        for rho in (7, 3):
            for churn in CHURNS:
                theirs = run_edm(space["edm_sampler"], num_steps=steps, rho=rho, **churn)
                i = np.arange(steps)
                sigma = (80 ** (1 / rho) + i / (steps - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
                grid = explicit(np.ones(steps + 1), np.append(sigma, 0.0), process=levels)
                table = solver.edm(levels, grid, **{k.lower(): v for k, v in churn.items()})
                name = "EDM edm_sampler, " + ("churn" if churn else "no churn")
                report.add(
                    name,
                    "edm(s_churn=...)" if churn else "edm",
                    compare(table, theirs, churn_rows(steps, True), steps == 5),
                )
    for disc in ("vp", "ve", "iddpm", "edm"):
        for schedule in ("vp", "ve", "linear"):
            for scaling in ("none", "vp"):
                for kind in ("euler", "heun"):
                    for churn in CHURNS:
                        ablation(space, report, disc, schedule, scaling, kind, churn)


def ablation(space: dict, report: Report, disc: str, schedule: str, scaling: str, kind: str, churn: dict) -> None:
    """One configuration of the general sampler, 8 steps."""
    options = {"num_steps": 8, "solver": kind, "discretization": disc, "schedule": schedule, "scaling": scaling}
    theirs = run_edm(space["ablation_sampler"], **options, **churn)
    plain = theirs if not churn else run_edm(space["ablation_sampler"], **options, **{**churn, "S_churn": 0})
    nodes = plain.states[:: 1 if kind == "euler" else 2]  # the levels of the steps' starts
    alpha, sigma = np.array([s[:2] for s in nodes]).T
    low = {"vp": np.sqrt(np.exp(0.5 * 19.9e-6 + 0.1e-3) - 1), "ve": 0.02, "iddpm": 0.002, "edm": 0.002}[disc]
    high = {"vp": np.sqrt(np.exp(0.5 * 19.9 + 0.1) - 1), "ve": 100.0, "iddpm": 81.0, "edm": 80.0}[disc]
    beta_d = 2 * (np.log(low**2 + 1) / 1e-3 - np.log(high**2 + 1)) / (1e-3 - 1)
    path = Ablation(schedule, scaling, beta_d, np.log(high**2 + 1) - 0.5 * beta_d)
    time = np.append(path.time(np.log(alpha / sigma)), 0.0)
    own = process.Process(path, t_max=float(2 * time[0]))
    grid = explicit(np.append(alpha, 1.0), np.append(sigma, 0.0), time)
    straight = (schedule, scaling) == ("linear", "none")
    clock = "rho" if straight else "time"
    lowered = {k.lower(): v for k, v in churn.items()}
    table = solver.edm(own, grid, heun=kind == "heun", clock=clock, variant="public", **lowered)
    name = f"EDM ablation_sampler, {kind}, {'linear without scaling' if straight else 'other schedules and scalings'}"
    name, draw_of = name + (", churn" if churn else ""), churn_rows(8, kind == "heun")
    told = f"edm(clock={clock!r}, variant='public')"
    if churn and scaling == "vp" and churn.get("S_max", np.inf) >= sigma[0] / alpha[0]:
        name += " from the first step, under scaling"
    report.add(name, told, compare(table, theirs, draw_of, True))
    if not straight:
        # what their Euler step to sigma = 0 in a curved clock leaves
        left = np.max(np.abs(theirs.end - posterior(WORLD, theirs.states[-1][2], *theirs.states[-1][:2])[0]))
        report.add(f"EDM ablation_sampler, schedule {schedule}, scaling {scaling}: end less x0_hat", "", (left, 0.0))


# k-diffusion: dpm_fast, with and without noise


def replay_k_diffusion(folder: pathlib.Path, report: Report) -> None:
    """sample_dpm_fast, from the syntax tree of sampling.py, whose imports are not needed."""
    tree = ast.parse((folder / "k_diffusion" / "sampling.py").read_text())
    names = ("get_ancestral_step", "DPMSolver", "sample_dpm_fast")
    wanted = [n for n in tree.body if getattr(n, "name", None) in names]
    bar = type("Bar", (), {"__enter__": lambda self: self, "__exit__": lambda *a: None, "update": lambda *a: None})
    space: dict = {"torch": torch, "math": math, "nn": torch.nn, "tqdm": lambda **options: bar()}
    exec(compile(ast.Module(wanted, []), "sampling.py", "exec"), space)
    levels = process.edm()
    for calls in (7, 8, 9):
        blocks = calls // 3 + 1
        orders = [3] * (blocks - 2) + [2, 1] if calls % 3 == 0 else [3] * (blocks - 1) + [calls % 3]
        ends = np.linspace(-np.log(20.0), -np.log(0.02), blocks + 1)
        lam = [ends[i] + (ends[i + 1] - ends[i]) * j / n for i, n in enumerate(orders) for j in range(n)]
        grid = explicit(np.ones(calls + 1), np.exp(-np.append(lam, ends[-1])), process=levels)
        for eta, s_noise in ((0.0, 1.0), (0.4, 1.0), (1.0, 1.0), (1.0, 1.007), (1.6, 1.0)):
            watch = Watch()
            end = space["sample_dpm_fast"](
                lambda x, sigma, watch=watch: watch.denoise(x, 1.0, sigma[0]),
                torch.from_numpy(20.0 * UNIT),
                0.02,
                20.0,
                calls,
                eta=eta,
                s_noise=s_noise,
                noise_sampler=lambda s, t, watch=watch: watch.noise(torch.zeros(UNIT.size)),
            )
            table = solver.dpm_solver(levels, grid, eta=eta, s_noise=s_noise)
            draw_of = {int(row): i for i, row in enumerate(np.cumsum(orders) - 1)}
            name = "k-diffusion dpm_fast" + (", eta 0.4, 1, 1.6; s_noise" if eta else "")
            report.add(
                name, "dpm_solver(method='fast')", compare(table, Theirs(watch.states, end.numpy(), 0), draw_of, True)
            )


# azula


def run_azula(sample: object, kind: type, schedule: object, options: dict, span: tuple) -> tuple:
    """Run one of azula's samplers; also the grid's alpha, sigma."""
    watch = Watch()

    class World(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> object:
            alpha, sigma = schedule(t)
            return type("Posterior", (), {"mean": watch.denoise(x, alpha, sigma)})()

    world = World()
    world.schedule = schedule
    run = kind(world, start=span[0], stop=span[1], steps=span[2], silent=True, dtype=torch.float64, **options)
    alpha, sigma = (v.numpy().copy() for v in schedule(run.timesteps))
    old, torch.randn_like = torch.randn_like, watch.noise
    try:
        end = run(torch.from_numpy(float(sigma[0]) * UNIT))
    finally:
        torch.randn_like = old
    return Theirs(watch.states, end.numpy(), watch.drawn), alpha, sigma


def mended(sample: object, exact: bool) -> type:
    """azula's REAB with the end's own sigma under the root, and, if ``exact``, its weights integrated to rounding."""
    import inspect
    import textwrap

    source = textwrap.dedent(inspect.getsource(sample.REABSampler))
    changes = {
        "alpha_s**2 + sigma_t**2) * integral": "alpha_s**2 + sigma_s**2) * integral",
        "steps=256 + 1": "steps=20000 + 1",
        "torch.trapezoid(y, u, dim=-1)": "(y @ _simpson(20001)) * (u[1] - u[0])",
    }
    for old, new in list(changes.items())[: 3 if exact else 1]:
        if old not in source:
            raise ValueError(f"azula: REABSampler no longer has {old!r}")
        source = source.replace(old, new)

    def simpson(n: int) -> torch.Tensor:
        w = torch.ones(n)
        w[1:-1:2], w[2:-1:2] = 4.0, 2.0
        return w / 3

    space = {**vars(sample), "_simpson": simpson}
    exec(source, space)
    return space["REABSampler"]


def replay_azula(folder: pathlib.Path, report: Report) -> None:
    """Every sampler of azula on its own schedules."""
    sys.path.insert(0, str(folder))
    from azula import noise, sample

    spans = [(1.0, 0.0, 9), (1.0, 0.0, 16), (0.9, 0.15, 10)]
    schedules = {
        "vp": noise.VPSchedule(),
        "ve": noise.VESchedule(),
        "cosine": noise.CosineSchedule(),
        "rectified": noise.RectifiedSchedule(),
        "decay": noise.DecaySchedule(),
        "flow": lambda t: (1 - t, t),  # alpha = 0 at the start, sigma = 0 at the end
    }
    never = {"lower_order_final": "never"}
    cases = [("DDPM", "ddim(eta=1)", sample.DDPMSampler, {}, lambda p, g: solver.ddim(p, g, eta=1.0), 1)]
    for eta in (0.0, 0.4, 1.0):
        cases.append(
            (
                "DDIM, eta 0, 0.4, 1",
                "ddim(eta=sqrt(eta))",
                sample.DDIMSampler,
                {"eta": eta},
                lambda p, g, eta=eta: solver.ddim(p, g, eta=np.sqrt(eta)),
                1,
            )
        )
    cases.append(
        (
            "DDIM, eta 3",
            "euler_ancestral(eta=sqrt(3))",
            sample.DDIMSampler,
            {"eta": 3.0},
            lambda p, g: solver.euler_ancestral(p, g, eta=np.sqrt(3.0)),
            1,
        )
    )
    cases.append(
        ("Euler", "euler(rho), ddim", sample.EulerSampler, {}, lambda p, g: solver.euler(p, g, clock="rho"), 1)
    )
    cases.append(("Heun", "heun(rho)", sample.HeunSampler, {}, lambda p, g: solver.heun(p, g, clock="rho"), 1))
    for eta, temperature in ((0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (1.0, 2.0)):
        cases.append(
            (
                "Ito, eta 0, 0.5, 1; temperature 2",
                "euler_maruyama",
                sample.ItoSampler,
                {"eta": eta, "temperature": temperature},
                lambda p, g, e=eta, t=temperature: solver.euler_maruyama(p, g, eta=e, temperature=t),
                1,
            )
        )
    root, both = (mended(sample, exact) for exact in (False, True))
    for n in (1, 2, 3, 4):
        cases += [
            (
                "zAB, orders 1-4",
                "lms",
                sample.zABSampler,
                {"order": n},
                lambda p, g, n=n: solver.lms(p, g, order=n),
                1,
            ),
            (
                "vAB, orders 1-4",
                "velocity_ab",
                sample.vABSampler,
                {"order": n},
                lambda p, g, n=n: solver.velocity_ab(p, g, order=n),
                1,
            ),
            (
                "zEAB, orders 1-4",
                'dpm_solver(method="multistep", variant="lagrange")',
                sample.zEABSampler,
                {"order": n},
                lambda p, g, n=n: solver.dpm_solver(p, g, order=n, method="multistep", variant="lagrange", **never),
                1,
            ),
            (
                "zEAB, orders 1-4 ",
                'deis(variable="lam")',
                sample.zEABSampler,
                {"order": n},
                lambda p, g, n=n: solver.deis(p, g, order=n, variable="lam"),
                1,
            ),
            (
                "xEAB, orders 1-4",
                'dpm_solver_pp(variant="lagrange")',
                sample.xEABSampler,
                {"order": n},
                lambda p, g, n=n: solver.dpm_solver_pp(p, g, order=n, variant="lagrange", **never),
                1,
            ),
        ]
        ours = lambda p, g, n=n: solver.velocity_ab(p, g, order=n, clock="rosenbrock")
        cases.append(
            ("REAB, orders 1-4", 'velocity_ab(clock="rosenbrock")', sample.REABSampler, {"order": n}, ours, 1)
        )
        for name, kind in (("REAB with its root mended", root), ("REAB with root and weights mended", both)):
            cases.append((name, 'velocity_ab(clock="rosenbrock")', kind, {"order": n}, ours, 1))
    for corrections, delta in ((0, 0.01), (1, 0.01), (2, 0.3)):
        cases.append(
            (
                "PC, 0, 1, 2 corrections",
                "predictor_corrector",
                sample.PCSampler,
                {"corrections": corrections, "delta": delta},
                lambda p, g, c=corrections, x=delta: solver.predictor_corrector(p, g, corrections=c, delta=x),
                corrections,
            )
        )
    ours_process = process.linear()
    ends = ("DDPM", "DDIM", "vAB", "PC")  # those of azula's formulas that do not divide by alpha_t or sigma_s
    for schedule_name, schedule in schedules.items():
        for span in spans:
            for name, told, kind, options, make, draws in cases:
                if schedule_name == "flow" and span[0] == 1 and not name.startswith(ends):
                    continue
                theirs, alpha, sigma = run_azula(sample, kind, schedule, options, span)
                grid = explicit(alpha, sigma, 1000 * np.linspace(1, 0, alpha.size))
                table = make(ours_process, grid)
                if name.startswith("PC"):
                    c = draws
                    draw_of = {(c + 1) * i + j: c * i + j for i in range(span[2]) for j in range(c)}
                else:
                    draw_of = {k: k for k in range(table.rows)}
                report.add(f"azula {name}", told, compare(table, theirs, draw_of, span[2] == 9))


def main() -> None:
    """Read the two folders and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edm", type=pathlib.Path, help="work tree of NVlabs/edm")
    parser.add_argument("--azula", type=pathlib.Path, help="work tree of probabilists/azula")
    parser.add_argument("--k-diffusion", type=pathlib.Path, help="work tree of crowsonkb/k-diffusion")
    options = parser.parse_args()
    if not (options.edm or options.azula or options.k_diffusion):
        parser.error("give --edm, --azula, --k-diffusion, or several")
    report = Report()
    if options.edm:
        replay_edm(options.edm, report)
    if options.azula:
        replay_azula(options.azula, report)
    if options.k_diffusion:
        replay_k_diffusion(options.k_diffusion, report)
    report.write()


if __name__ == "__main__":
    main()
