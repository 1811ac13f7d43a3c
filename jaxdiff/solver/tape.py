"""Rows written as formulas over quantities that are not carried.

A scheme speaks of base states, corrected states and overwritten history; a table carries one state and a few
records. Every such quantity is ``y`` of some row times a number plus a combination of records, and because a row is
invertible (``y_k = (y_{k+1} - sum b d)/a``) it can be rewritten in terms of the state carried now. A :class:`Tape` does that
rewriting, so a maker reads like the paper's equations and still makes one-state tables.
"""

from __future__ import annotations

from typing import Any

from jaxdiff.process.process import Process
from jaxdiff.solver.build import DATA, Rows
from jaxdiff.solver.grid import Point
from jaxdiff.solver.table import Table

__all__ = ["Expression", "Tape"]


class Expression:
    """States ``y[row]`` and records ``d[row]`` with their coefficients, plus a constant ``e``; supports + - and scaling."""

    __slots__ = ("d", "e", "tape", "y")

    def __init__(self, tape: Tape, y: dict[int, float], d: dict[int, float], e: float = 0.0):
        self.tape, self.y, self.d, self.e = tape, y, d, e

    def now(self) -> Expression:
        """The same quantity in terms of the state carried now; unchanged on a tape that keeps states."""
        if self.tape.keep or not self.y:
            return Expression(self.tape, dict(self.y), dict(self.d), self.e)
        ((row, a),) = self.y.items()
        d, e = dict(self.d), self.e
        for gain, records, constant in self.tape.moves[row:]:
            a = a / gain
            e -= a * constant
            for k, b in records.items():
                d[k] = d.get(k, 0.0) - a * b
        return Expression(self.tape, {len(self.tape.moves): a}, d, e)

    def __add__(self, other: Any) -> Expression:
        left = self.now()
        if not isinstance(other, Expression):
            return Expression(left.tape, left.y, left.d, left.e + float(other))
        right = other.now()
        y, d = _sum(left.y, right.y), _sum(left.d, right.d)
        return Expression(left.tape, y, d, left.e + right.e)

    def __radd__(self, other: Any) -> Expression:
        return self + other

    def __mul__(self, gain: float) -> Expression:
        g = float(gain)
        return Expression(
            self.tape, {k: g * a for k, a in self.y.items()}, {k: g * b for k, b in self.d.items()}, g * self.e
        )

    def __rmul__(self, gain: float) -> Expression:
        return self * gain

    def __truediv__(self, divisor: float) -> Expression:
        return self * (1.0 / float(divisor))

    def __sub__(self, other: Any) -> Expression:
        return self + (-1.0) * other if isinstance(other, Expression) else self + (-float(other))


def _sum(left: dict[int, float], right: dict[int, float]) -> dict[int, float]:
    return {k: left.get(k, 0.0) + right.get(k, 0.0) for k in (*left, *(k for k in right if k not in left))}


class Tape:
    """A notebook of rows: ``record = evaluate(at, form)``, then ``move(next_state)``; ends as a Table.

    ``keep``: earlier states stay in the table (as many as are used) instead of being rewritten.
    """

    def __init__(self, process: Process, start: Point, *, keep: bool = False):
        self.process, self.rows, self.keep = process, Rows(process, start), keep
        self.moves: list[tuple[float, dict[int, float], float]] = []
        self.pending: tuple[Point, tuple[float, float]] | None = None

    @property
    def state(self) -> Expression:
        """The state carried now."""
        return Expression(self, {len(self.moves): 1.0}, {})

    def evaluate(self, at: Point, form: tuple[float, float] = DATA) -> Expression:
        """Call the network at the carried state; the record ``p x0_hat + q eps_hat``."""
        self.pending = (at, form)
        return Expression(self, {}, {len(self.moves): 1.0})

    def infer(self, at: Point, form: tuple[float, float]) -> Expression:
        """:meth:`evaluate`, but what is kept is x0_hat: ``eps_hat = (y - alpha x0_hat)/sigma`` is left to the state.

        Of float32's rounding this passes on ``alpha/sigma`` times that of x0_hat instead of that of eps_hat itself, which steps
        in noise form multiply by their weights. The table is the same solver.
        """
        (p, q), data = form, self.evaluate(at, DATA)
        return (q / at.sigma) * self.state + (p - q * at.alpha / at.sigma) * data

    def move(self, to: Expression, *, out: bool = True, noise: float = 0.0) -> None:
        """End the row: the next state is ``to`` plus fresh noise of std ``noise``. ``out`` False for stages inside a step.

        States from before a noisy row cannot be used after it: the rewriting knows nothing of the noise.
        """
        to, k = to.now(), len(self.moves)
        if self.pending is None:
            raise ValueError("tape: move() without an evaluate() before it")
        at, form = self.pending
        # rounding left by terms that cancel is dropped
        size = 1e-15 * max(abs(v) for v in (*to.y.values(), *to.d.values()))
        states = {j: a for j, a in to.y.items() if abs(a) > size}
        records = {j: b for j, b in to.d.items() if abs(b) > size}
        self.rows.add(at, _ages(states, k), _ages(records, k), C=noise, E=to.e, form=form, out=out)
        self.moves.append((states.get(k, 0.0), records, to.e))
        self.pending = None

    def table(self, end: Point, *, stochastic: bool = False, mode: tuple[int, ...] | None = None) -> Table:
        """The table ending at ``end``; ``stochastic`` keeps the noise column even if every entry is 0."""
        return self.rows.table(end, stochastic=stochastic, mode=mode)


def _ages(values: dict[int, float], k: int) -> list[float]:
    """Coefficients newest first."""
    return [values.get(k - h, 0.0) for h in range(max([k - j for j in values] + [0]) + 1)]
