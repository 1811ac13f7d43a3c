"""Families of tables: choose the leaves of a table that may move, keep the rest valid.

``build`` computes in numpy float64 when given numpy, so a learned table is as exact as a made one; under a gradient it
computes in jax. These are the non-stationary tables of BNS and S4S.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdiff.near import unknown
from jaxdiff.process.process import Process
from jaxdiff.solver.table import AffineBlock, Table, blocks_of, freeze

__all__ = ["LEAVES", "Family", "family", "one_block", "shifted"]

LEAVES = ("times", "A", "B", "form")


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """Tables ``build(parameters)``, a dict of arrays; ``start`` gives the table the family was made around."""

    build: Callable[[dict], Table]
    start: dict[str, np.ndarray]


def one_block(table: Table, caller: str) -> AffineBlock:
    """The table's one deterministic block with scalar coefficients, or a ValueError in the name of ``caller``."""
    blocks = blocks_of(table)
    if len(blocks) != 1 or not isinstance(blocks[0], AffineBlock) or np.ndim(blocks[0].A) != 2:
        raise ValueError(f"table: {caller} takes a table of one affine block with scalar coefficients, not a stack")
    if blocks[0].stochastic:
        raise ValueError(f"table: {caller} takes deterministic tables; this one draws noise")
    return blocks[0]


def check_train(train: Sequence[str], allowed: Sequence[str]) -> None:
    """Refuse an empty ``train`` and names that are not ``allowed``."""
    for name in train:
        if name not in allowed:
            raise unknown("train", name, allowed)
    if not train:
        raise ValueError(f"train: none given; allowed: {', '.join(allowed)}")


def _widened(column: np.ndarray, width: int) -> np.ndarray:
    return np.pad(column, ((0, 0), (0, max(0, width - column.shape[1]))))


def family(
    table: Table,
    process: Process | None = None,
    *,
    train: Sequence[str] = ("B",),
    records: int | None = None,
    states: int | None = None,
    consistent: bool = True,
) -> Family:
    """The tables around ``table`` whose leaves named in ``train`` move freely; the others stay.

    Args:
        table: a deterministic table of one block.
        process: the path that moving times follow; needed for "times".
        train: any of LEAVES. "times": interior grid times, as the softmax of K logits for the gaps between fixed
            ends, so they stay strictly decreasing (tables whose states all are grid points only). "A", "B": the coefficients
            of earlier states and of records. "form": the angle of the stored mixture of data and noise, kept on
            the side of ``sigma p - alpha q`` where the table's is, so that a record always tells the data.
        records, states: widths of the history, at least the table's; wider ones start at zero (records=K is
            the dense normal form).
        consistent: keep every row exact on delta data, ``sum A sigma + sum B q = sigma_s`` and
            ``sum A alpha + sum B p = alpha_s``, by solving for the two newest coefficients; they are then not
            parameters. False frees them, from the table's values.

    Raises ValueError for other tables, unknown leaves, and what the choice needs but lacks.
    """
    block = one_block(table, "family()")
    check_train(train, LEAVES)
    K = table.rows
    A = _widened(np.asarray(block.A, np.float64), min(states or 0, K))
    B = _widened(np.asarray(block.B, np.float64), min(records or 0, K))
    p, q = (np.zeros(K) if v is None else np.asarray(v, np.float64) for v in (block.p, block.q))
    time = np.asarray(table.time, np.float64)
    alpha, sigma = np.asarray(block.alpha, np.float64), np.asarray(block.sigma, np.float64)
    if consistent and (block.E is not None or not _rows_consistent(A, B, p, q, alpha, sigma)):
        raise ValueError("consistent: True given, but the table's own rows are not exact on delta data; give False")
    start: dict[str, np.ndarray] = {}
    if "times" in train:
        if process is None:
            raise ValueError("process: missing; learned times need the path they lie on")
        if not np.all(np.asarray(table.out)) or not np.allclose(np.asarray(table.tau), time[:-1]):
            raise ValueError("train: 'times' given, but this table has stages inside its steps; learn A, B, form")
        gaps = -np.diff(time)
        start["times"] = np.log(gaps[gaps > 0])  # a clean point appended at the same time does not move
    if "form" in train:
        base_sign, size, angle = _angles(p, q, alpha[:-1], sigma[:-1])
        start["form"] = np.arctanh(np.clip(angle / (np.pi / 2), -1 + 1e-12, 1 - 1e-12))
    skip = 1 if consistent else 0
    seen = lambda width: (np.arange(width)[None] <= np.arange(K)[:, None]).astype(np.float64)
    for name, column in (("A", A), ("B", B)):
        if name in train and column.shape[1] > skip:
            start[name] = column[:, skip:].copy()
        elif name in train and len(train) == 1:
            raise ValueError(f"train: {name!r} has nothing free on one register; widen it, or give consistent=False")

    def build(parameters: dict) -> Table:
        host = all(isinstance(v, np.ndarray) for v in parameters.values())
        xp: Any = np if host else jnp
        t, al, si, P, Q = time, alpha, sigma, p, q
        if "times" in parameters:
            t, al, si = _moved(xp, process, parameters["times"], time, alpha, sigma)
        if "form" in parameters:
            P, Q = _turned(xp, parameters["form"], base_sign * size, al[:-1], si[:-1])
        older = {name: parameters.get(name, column[:, skip:]) for name, column in (("A", A), ("B", B))}
        older = {name: v * seen(v.shape[1] + skip)[:, skip:] for name, v in older.items()}
        if consistent:
            newest = _newest(xp, older["A"], older["B"], P, Q, al, si)
            columns = [xp.concatenate([v[:, None], older[n]], 1) for n, v in zip("AB", newest)]
        else:
            columns = [older["A"], older["B"]]
        plain = "form" not in parameters
        made = dataclasses.replace(
            block,
            p=block.p if plain else P,
            q=block.q if plain else Q,
            A=columns[0],
            B=columns[1],
            alpha=al,
            sigma=si,
        )
        made_table = dataclasses.replace(
            table, blocks=made, tau=t[:-1] if "times" in parameters else table.tau, time=t
        )
        return freeze(made_table) if host else made_table

    return Family(build, start)


def _moved(
    xp: Any, process: Any, logits: Any, time: np.ndarray, alpha: np.ndarray, sigma: np.ndarray
) -> tuple[Any, Any, Any]:
    """``(time, alpha, sigma)`` with gaps in time as the softmax of ``logits``; the ends stay what they are, exactly."""
    fixed = 1 + int(time[-1] == time[-2])  # points at the last time: one, or two with an appended clean one
    weights = xp.exp(logits - xp.max(logits))
    passed = xp.cumsum((time[0] - time[-1]) * weights / xp.sum(weights))
    inner = time[0] - passed[:-1]
    c = process.coefficients(inner)
    ends = lambda column, inside: xp.concatenate([column[:1], inside, column[-fixed:]])
    return ends(time, inner), ends(alpha, c.alpha), ends(sigma, c.sigma)


def _turned(xp: Any, form: Any, size: Any, alpha: Any, sigma: Any) -> tuple[Any, Any]:
    """``(p, q)`` of signed ``size`` at the angle ``(pi/2) tanh(form)`` from the direction (sigma, -alpha)."""
    angle = 0.5 * np.pi * xp.tanh(form)
    norm = xp.sqrt(alpha**2 + sigma**2)
    cos, sin = xp.cos(angle) * size / norm, xp.sin(angle) * size / norm
    return cos * sigma + sin * alpha, sin * sigma - cos * alpha


def shifted(xp: Any, v: Any, h: int, count: int) -> Any:
    """``v[k - h]`` for k < count, zero where there is none."""
    return xp.concatenate([xp.zeros(h), v[: count - h]]) if h else v[:count]


def _newest(xp: Any, A: Any, B: Any, p: Any, q: Any, alpha: Any, sigma: Any) -> tuple[Any, Any]:
    """The coefficients of the newest state and record that the two sum rules leave, given the older ones."""
    K = alpha.shape[0] - 1
    noise, data = sigma[1:], alpha[1:]
    for h in range(A.shape[1]):
        noise = noise - A[:, h] * shifted(xp, sigma, h + 1, K)
        data = data - A[:, h] * shifted(xp, alpha, h + 1, K)
    for h in range(B.shape[1]):
        noise = noise - B[:, h] * shifted(xp, q, h + 1, K)
        data = data - B[:, h] * shifted(xp, p, h + 1, K)
    det = sigma[:-1] * p - alpha[:-1] * q
    return (noise * p - data * q) / det, (sigma[:-1] * data - alpha[:-1] * noise) / det


def _rows_consistent(A: np.ndarray, B: np.ndarray, p: Any, q: Any, alpha: Any, sigma: Any) -> bool:
    if np.any(sigma[:-1] * p - alpha[:-1] * q == 0):
        return False
    a, b = _newest(np, A[:, 1:], B[:, 1:], p, q, alpha, sigma)
    scale = 1 + np.abs(A).max() + np.abs(B).max()
    return bool(np.allclose(a, A[:, 0], 0, 1e-7 * scale) and np.allclose(b, B[:, 0], 0, 1e-7 * scale))


def _angles(p: np.ndarray, q: np.ndarray, alpha: np.ndarray, sigma: np.ndarray) -> tuple:
    """Sign, size and angle of (p, q) from the direction (sigma, -alpha), in which a record is purest."""
    det, along = sigma * p - alpha * q, alpha * p + sigma * q
    if np.any(det == 0):
        raise ValueError("train: 'form' given, but some row stores a record that does not tell the data")
    sign = np.sign(det)
    return sign, np.hypot(p, q), np.arctan2(sign * along, np.abs(det))
