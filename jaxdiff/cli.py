"""The ``jaxdiff`` command: train, sample, eval, bench, export, plan. Help is printed without importing jax."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jaxdiff import config as config_lib
from jaxdiff.commands import bench_config

__all__ = ["main"]

EXAMPLES = {
    "train": "jaxdiff train --config configs/digits.py --workdir runs/digits --config.train.steps=2000",
    "sample": "jaxdiff sample --workdir runs/digits --config.solver.steps=8 --out samples.png",
    "eval": "jaxdiff eval --workdir runs/digits",
    "bench": "jaxdiff bench --config configs/bench/gmm.py --out report/ --config.samples=512",
    "export": "jaxdiff export --workdir runs/digits --out model/ --config.solver.steps=8",
    "plan": "jaxdiff plan --config configs/digits.py --mesh 8x16x1 --config.data.batch_size=4096",
}

OPTIONS = """

What a section names has options of its own, which stand beside the name: --config.solver.name=ddim
--config.solver.eta=0.5, --config.guidance.phi=0.7. They are the keyword arguments in its documentation; a wrong one
is refused with the list of them."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxdiff", description="Diffusion and flow generative models in JAX: train, sample, evaluate."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    like = {"export": "sample", "plan": "train"}  # commands that take the fields of another

    def command(name: str, summary: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  {EXAMPLES[name]}\n\nconfig fields, set with --config.FIELD=VALUE:\n"
            + (bench_config.describe() if name == "bench" else config_lib.describe(like.get(name, name)) + OPTIONS),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        added.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return added

    train = command(
        "train", "Train from a config file; checkpoints, metrics and pictures go to the working directory."
    )
    train.add_argument(
        "--config", required=True, metavar="FILE", help="Python file with get_config(); FILE:text passes text"
    )
    train.add_argument(
        "--workdir", required=True, metavar="DIR", help="folder of the run; training continues if one is there"
    )
    train.add_argument("--allow-config-change", action="store_true", help="continue a run under a changed config")
    train.add_argument(
        "--restarts",
        type=int,
        metavar="N",
        help="supervise: start again when training dies, giving up after N restarts without progress",
    )
    train.add_argument(
        "--stall-timeout",
        type=float,
        metavar="SECONDS",
        help="with --restarts: kill and restart when no step is logged for so long (start and compilation included)",
    )
    train.add_argument("--profile", metavar="A:B", help="trace steps A to B (config.train.profile)")
    sample = command("sample", "Draw samples from a trained run.")
    sample.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run")
    sample.add_argument(
        "--out", metavar="FILE", help=".png for a picture, .npz for all samples, resumable (default DIR/samples.png)"
    )
    sample.add_argument("--num", type=int, metavar="N", help="how many (default config.sample.num)")
    sample.add_argument("--label", type=int, metavar="C", help="one class; default: all in turn")
    evaluate = command(
        "eval", "Compare a trained run's samples with held-out data; writes metrics.json and samples.png."
    )
    evaluate.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run")
    bench = command("bench", "Compare solvers at equal cost on a problem with known answers; writes a report folder.")
    bench.add_argument("--config", required=True, metavar="FILE", help="Python file with get_config()")
    bench.add_argument(
        "--out", required=True, metavar="DIR", help="folder of the report; finished parts there are kept"
    )
    export = command("export", "Write a trained run's sampler as files that sample without jaxdiff.")
    export.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run")
    export.add_argument("--out", required=True, metavar="DIR", help="folder of sampler, weights and card")
    plan = command(
        "plan", "Size a training before there is hardware: bytes, FLOPs, collectives, step time, largest batch."
    )
    plan.add_argument("--config", required=True, metavar="FILE", help="Python file with get_config()")
    plan.add_argument("--mesh", metavar="DxFxT", help="data x fsdp x tensor devices (default config.mesh)")
    plan.add_argument("--shape", metavar="HxWxC", help="shape of one example; the data set is then not opened")
    plan.add_argument("--classes", type=int, default=0, metavar="K", help="labels of the data, with --shape")
    plan.add_argument("--mfu", type=float, default=0.4, help="assumed share of peak FLOPs, (0, 1] (default 0.4)")
    plan.add_argument("--no-compile", action="store_true", help="skip compiling, and with it the list of collectives")
    return parser


def _overrides(parser: argparse.ArgumentParser, rest: Sequence[str]) -> dict[str, str]:
    """``--config.FIELD=VALUE`` and ``--config.FIELD VALUE`` among the arguments argparse left over."""
    found, words = {}, list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--config."):
            parser.error(f"unknown argument {word!r}; config fields are set with --config.FIELD=VALUE")
        name, equals, value = word.removeprefix("--config.").partition("=")
        if not equals:
            if not words:
                parser.error(f"{word} needs a value")
            value = words.pop(0)
        found[name] = value
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. Errors a user can mend are one line on stderr, status 2 (3: training
    stopped at losses that are not finite)."""
    parser = _parser()
    given = sys.argv[1:] if argv is None else argv
    if given and not given[0].startswith("-") and given[0] not in EXAMPLES:
        hint = config_lib.near(given[0], EXAMPLES)
        parser.error(f"command: {given[0]!r} is unknown; allowed: {', '.join(EXAMPLES)}{hint}")
    args, rest = parser.parse_known_args(argv)
    overrides = _overrides(parser, rest)
    try:
        return _run(args, overrides)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        # what jaxdiff refuses on purpose, and what the system refuses it; anything else is a bug and keeps its traceback
        ours = type(error).__module__.partition(".")[0] == "jaxdiff"
        if args.debug or not (ours or isinstance(error, (ValueError, OSError, ModuleNotFoundError))):
            raise
        print(f"jaxdiff {args.command}: {error}", file=sys.stderr)
        return getattr(error, "exit_status", 2)


def _run(args: argparse.Namespace, overrides: dict[str, str]) -> int:
    if args.command == "train":
        if args.profile is not None:
            overrides["train.profile"] = args.profile
        config = config_lib.apply_overrides(config_lib.load(args.config), overrides)
        if args.restarts is None and args.stall_timeout is None:
            from jaxdiff.commands import program

            program.preload(args.workdir)  # while the rest is imported: the check itself imports the networks
        config_lib.check(config)
        if args.stall_timeout is not None and args.restarts is None:
            raise config_lib.ConfigError("--stall-timeout: needs --restarts N, the supervisor does the killing")
        if args.restarts is not None:
            return _supervise(args, overrides)
        from jaxdiff.commands import train

        train.run(config, args.workdir, change=args.allow_config_change)
    elif args.command == "sample":
        from jaxdiff.commands import draw

        print(draw.run(args.workdir, overrides, args.out, args.num, args.label))
    elif args.command == "bench":
        chosen = bench_config.check(bench_config.apply_overrides(config_lib.load(args.config), overrides))
        from jaxdiff.commands import bench

        bench.run(chosen, args.out)
    elif args.command == "export":
        from jaxdiff.commands import export

        print(export.run(args.workdir, args.out, overrides))
    elif args.command == "plan":
        config = config_lib.check(config_lib.apply_overrides(config_lib.load(args.config), overrides))
        from jaxdiff.commands.plan import run as run_plan

        return run_plan(
            config, args.mesh, shape=args.shape, classes=args.classes, mfu=args.mfu, compiled=not args.no_compile
        )
    else:
        from jaxdiff.commands import evaluate

        evaluate.run(args.workdir, overrides)
    return 0


def _supervise(args: argparse.Namespace, overrides: dict[str, str]) -> int:
    from jaxdiff.commands.supervise import supervise

    command = [sys.executable, "-m", "jaxdiff.cli", "train", "--config", args.config, "--workdir", args.workdir]
    command += ["--allow-config-change"] * args.allow_config_change + ["--debug"] * args.debug
    command += [f"--config.{name}={value}" for name, value in overrides.items()]
    return supervise(command, args.workdir, args.restarts, args.stall_timeout)


if __name__ == "__main__":
    sys.exit(main())
