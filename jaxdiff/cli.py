"""The ``jaxdiff`` command: train, sample, eval, bench. Help is printed without importing jax."""

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
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxdiff", description="Diffusion and flow generative models in JAX: train, sample, evaluate."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, summary: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  {EXAMPLES[name]}\n\nconfig fields, set with --config.FIELD=VALUE:\n"
            + (bench_config.describe() if name == "bench" else config_lib.describe(name)),
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
    """Run the command line; returns the exit status. Errors a user can mend are one line on stderr, status 2."""
    parser = _parser()
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
        return 2


def _run(args: argparse.Namespace, overrides: dict[str, str]) -> int:
    if args.command == "train":
        config = config_lib.check(config_lib.apply_overrides(config_lib.load(args.config), overrides))
        from jaxdiff.commands import train

        train.run(config, args.workdir, change=args.allow_config_change)
    elif args.command == "sample":
        from jaxdiff.commands import draw

        print(draw.run(args.workdir, overrides, args.out, args.num, args.label))
    elif args.command == "bench":
        chosen = bench_config.check(bench_config.apply_overrides(config_lib.load(args.config), overrides))
        from jaxdiff.commands import bench

        bench.run(chosen, args.out)
    else:
        from jaxdiff.commands import evaluate

        evaluate.run(args.workdir, overrides)
    return 0


if __name__ == "__main__":
    sys.exit(main())
