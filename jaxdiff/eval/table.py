"""Plain aligned tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def format_number(value: Any, digits: int = 4) -> str:
    """One cell: numbers to ``digits`` significant digits, None as ``-``, everything else as it prints."""
    if value is None:
        return "-"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return str(int(value))
    if isinstance(value, float | np.floating) or (hasattr(value, "dtype") and np.ndim(value) == 0):
        value = float(value)
        if not np.isfinite(value):
            return str(value)
        text = f"{value:#.{digits}g}"
        return text.rstrip(".")
    return str(value)


def format_table(rows: Sequence[Any], header: Sequence[str] | None = None, *, digits: int = 4) -> str:
    """Rows as text columns, numbers to the right and words to the left; a string without a final newline.

    Rows are sequences of equal length, or mappings (whose first row's keys are then the header).
    Raises ``ValueError`` for rows of different lengths.
    """
    rows = list(rows)
    if rows and isinstance(rows[0], Mapping):
        names = list(rows[0] if header is None else header)
        header, rows = names, [[row.get(name) for name in names] for row in rows]
    lengths = {len(row) for row in rows} | ({len(header)} if header is not None else set())
    if len(lengths) > 1:
        raise ValueError(f"rows: lengths {sorted(lengths)}; every row and the header need the same")
    if not lengths:
        return ""
    cells = [[format_number(value, digits) for value in row] for row in rows]
    lines = ([] if header is None else [[str(name) for name in header]]) + cells
    widths = [max(len(line[i]) for line in lines) for i in range(lengths.pop())]
    words = [all(isinstance(row[i], str) for row in rows) for i in range(len(widths))]

    def join(line: Sequence[str]) -> str:
        parts = [c.ljust(w) if left else c.rjust(w) for c, w, left in zip(line, widths, words, strict=True)]
        return "  ".join(parts).rstrip()

    out = [join(line) for line in lines]
    if header is not None:
        out.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(out)
