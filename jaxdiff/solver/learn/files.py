"""Learned tables as files: plain arrays and a JSON line."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from jaxdiff.process import noise as laws
from jaxdiff.solver.table import COLUMNS, AffineBlock, Table, blocks_of, freeze

__all__ = ["load", "save"]

_TABLE = ("tau", "time", "out", "live", "r")


def save(path: str | os.PathLike, table: Table, **about: Any) -> None:
    """Write a table of one block as plain arrays (``path``, .npz) with a JSON line of what it is (law, mode, ``about``).

    Raises ValueError for tables of several blocks and paths without .npz.
    """
    if not str(path).endswith(".npz"):
        raise ValueError(f"path: {str(path)!r} given; tables are saved as .npz")
    block = blocks_of(table)[0]
    if len(blocks_of(table)) != 1 or not isinstance(block, AffineBlock):
        raise ValueError("table: save() takes a table of one affine block")
    if not block.law.gaussian:
        raise ValueError(f"table: made for {block.law.name} noise; save() takes tables of Gaussian noise")
    arrays = {f"block.{n}": getattr(block, n) for n in COLUMNS} | {n: getattr(table, n) for n in _TABLE}
    meta = {"format": 1, "law": block.law.name, "mode": table.mode, "about": about}
    kept = {name: np.asarray(v) for name, v in arrays.items() if v is not None}
    np.savez(path, json=np.array(json.dumps(meta)), **kept)  # type: ignore[arg-type]


def load(path: str | os.PathLike) -> tuple[Table, dict]:
    """``(table, about)`` written by :func:`save`, bitwise. Raises ValueError for other files."""
    with np.load(path, allow_pickle=False) as file:
        if "json" not in file or "block.A" not in file:
            raise ValueError(f"path: {str(path)!r} holds no table written by save()")
        meta = json.loads(str(file["json"]))
        read = lambda name: file[name] if name in file else None
        block = AffineBlock(**{n: read(f"block.{n}") for n in COLUMNS}, law=laws.Gaussian())
        mode = None if meta["mode"] is None else tuple(meta["mode"])
        table = Table(blocks=block, **{n: read(n) for n in _TABLE}, mode=mode)
    return freeze(table), meta["about"]
