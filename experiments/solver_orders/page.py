"""Write a Markdown page of measurements, or compare the one there is with what is measured."""

import argparse
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence


def main(
    description: str, path: pathlib.Path, text: str, head: Sequence[str], cases: Iterable[str], measure: Callable
) -> None:
    """Write ``text`` and a table of ``measure(name)``, a row of cells, for every case; with --check, compare instead."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the page instead of writing it")
    check = parser.parse_args().check
    rows = [measure(name) for name in cases]
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]]
    page = text + "\n".join(lines) + "\n"
    if not check:
        path.write_text(page)
        print(f"wrote {path}: {len(rows)} solvers")
    elif path.read_text() != page:
        sys.exit(f"{path} differs from what is measured; run without --check")
