"""What float32 does to a run, known before it: the size of its rounding, and rows rewritten where that is large.

A step in noise form from pure noise multiplies eps_hat by weights of tens that all but cancel, and the rounding of eps_hat
with them. The same step in data form has small weights. ``eps_hat = (y - alpha x0_hat)/sigma``, so which of the two a row
keeps is free; an earlier row's ``y`` is recovered from the state carried now, through the rows between.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from jaxdiff.process.process import Process
from jaxdiff.solver.algebra import check, plain_block
from jaxdiff.solver.grid import Point
from jaxdiff.solver.table import Table, freeze
from jaxdiff.solver.tape import Tape

__all__ = ["LIMIT", "rounding", "steady"]

ULP = 2.0**-24
LIMIT = 3e-6
"""Relative rounding of the end above which :func:`steady` rewrites; tables on usual grids stay near 4e-7."""


def rounding(table: Table) -> float:
    """Estimated RMS rounding error of a float32 run, relative to the size of its end; right to a factor of about 3 on
    Gaussian data of unit variance, of 6 on data of two modes.

    For such data every prediction is a known number times the state, so how much of a rounding made anywhere reaches
    the end is a product of known numbers. Counted are, for each row: 2^-24 of the size of each term of its sum, of
    the sum and of a stored eps_hat, and 0.4 times 2^-24 (the RMS of one rounding) for a stored x0_hat, whose size is
    1. Fresh noise is not counted. Needs a table of one state.
    """
    return _rounding(table)[0]


def _rounding(table: Table) -> tuple[float, float]:
    """:func:`rounding`, and the part of it that the states alone leave, whatever the rows keep."""
    block = plain_block(table)
    alpha, sigma = block.alpha[:-1], block.sigma[:-1]
    slope = ((block.p * alpha + block.q * sigma) / (alpha**2 + sigma**2)).tolist()
    member = np.hypot(0.4 * block.p, block.q).tolist()
    A, B = block.A[:, 0].tolist(), block.B.tolist()
    rows, y, records, states, local = len(A), math.hypot(alpha[0], sigma[0]), [], [], []
    for k in range(rows):
        records.append(slope[k] * y)
        terms = [A[k] * y, *(b * d for b, d in zip(B[k], reversed(records)))]
        y = sum(terms)
        states.append(y)
        local.append(math.hypot(*terms, y))
    reach, onward, total, own = [0.0] * rows, 1.0, 0.0, 0.0  # of row k's record and of its next state, on the end
    for k in reversed(range(rows)):
        for h, b in enumerate(B[k][: k + 1]):
            reach[k - h] += b * onward
        total += (onward * local[k]) ** 2 + (reach[k] * member[k]) ** 2
        own += (onward * states[k]) ** 2
        onward = A[k] * onward + slope[k] * reach[k]
    size = max(abs(y), math.hypot(block.alpha[-1], block.sigma[-1]))
    return ULP * math.sqrt(total) / size, ULP * math.sqrt(own) / size


def steady(process: Process, table: Table) -> Table:
    """The same solver with less rounding: its first n rows of more noise than signal store x0_hat instead.

    Returned as they are: tables whose :func:`rounding` is below ``LIMIT`` or mostly that of the states themselves,
    and tables that carry earlier states. A rewritten row may add a record to the history, since eps_hat of an earlier
    row then has to be recovered from later ones. So n is the smallest number that brings the rounding below the limit
    (tried beyond 8 in strides of n/8); where none does, because the weights on x0_hat are as large, one near the
    least. No n is taken that makes the table much less exact on delta data in float64 (:func:`check`). Rewritten rows
    do not read the noise of a free pair (guided data, unguided noise): they use the one that agrees with their
    x0_hat.
    """
    if np.shape(table.blocks.A)[1] > 1 or table.blocks.q is None:
        return table
    plain, own = _rounding(table)
    # fine grids add up what the states themselves are rounded by
    rows = _noisy(table) if plain > max(LIMIT, 2 * own) else []
    if not rows:
        return table
    inexact = max(check(table))
    allowed = max(1.5 * inexact, min(16 * inexact, 1e-9), 1e-11)
    tried, n = [(plain, table)], 0
    while n < len(rows):
        n = min(n + 1 + n // 8, len(rows))
        kept = _keep_data(process, table, frozenset(rows[:n]))
        if max(check(kept)) > allowed:
            continue
        tried.append((rounding(kept), kept))
        if tried[-1][0] <= LIMIT:
            return kept
    least = min(size for size, _ in tried)
    return next(kept for size, kept in tried if size <= 1.5 * least)


def _noisy(table: Table) -> list[int]:
    """Rows of more noise than signal that store something else than x0_hat, if no row reads it after fresh noise was
    added (the state it was made at could then not be recovered)."""
    block = plain_block(table)
    found = []
    for k in np.flatnonzero((block.q != 0) & (block.alpha < block.sigma)[:-1]):
        used = [k + h for h in range(block.B.shape[1]) if k + h < len(block.B) and block.B[k + h, h] != 0]
        if not used or not np.any(block.C[k : max(used)]):
            found.append(int(k))
    return found


def _keep_data(process: Process, table: Table, rows: frozenset[int]) -> Table:
    """``table`` with x0_hat kept by ``rows``."""
    block = plain_block(table)
    points = [Point(float(t), float(a), float(s)) for t, a, s in zip(table.tau, block.alpha, block.sigma)]
    tape, kept = Tape(process, points[0]), []
    for k, at in enumerate(points):
        ask = tape.infer if k in rows else tape.evaluate
        kept.append(ask(at, (float(block.p[k]), float(block.q[k]))))
        to = block.A[k, 0] * tape.state + float(block.E[k])
        for h in np.flatnonzero(block.B[k]):
            to = to + block.B[k, h] * kept[k - h]
        tape.move(to)
    columns = {name: getattr(tape.table(points[-1]).blocks, name) for name in ("p", "q", "A", "B", "E")}
    return freeze(dataclasses.replace(table, blocks=dataclasses.replace(table.blocks, **columns)))
