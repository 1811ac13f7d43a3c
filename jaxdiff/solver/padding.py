"""Columns of a table made longer and wider, so that tables of different solvers stack."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["pad_rows", "pad_states", "widen"]


def pad_rows(column: Any, rows: int, fill: Any = None) -> Any:
    """``column`` with rows appended: ``fill``, or its last row repeated; None stays None."""
    if column is None:
        return None
    column = np.asarray(column)
    extra = rows - column.shape[0]
    if extra == 0:
        return column
    last = column[-1:] if fill is None else np.broadcast_to(np.asarray(fill, column.dtype), (1, *column.shape[1:]))
    return np.concatenate([column, np.repeat(last, extra, 0)])


def pad_states(values: Any, rows: int) -> np.ndarray:
    """``values`` (K+1, ...) for ``rows`` rows: padding rows are evaluated where the last live row was, a point every denoiser
    accepts, and the end stays the end."""
    values = np.asarray(values)
    extra = rows + 1 - values.shape[0]
    if extra == 0:
        return values
    return np.concatenate([values[:-1], np.repeat(values[-2:-1], extra, 0), values[-1:]])


def widen(column: Any, width: int) -> np.ndarray:
    """``column`` (K, H, ...) with its history axis filled with zeros up to ``width``."""
    column = np.asarray(column)
    extra = [(0, 0)] * column.ndim
    extra[1] = (0, width - column.shape[1])
    return np.pad(column, extra)
