"""Several denoisers, one a row: T-Stitch and every other choice of model by step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxdiff import prediction
from jaxdiff.guidance.mix import check_one_process, tabulated
from jaxdiff.prediction import Query, evaluate, lift
from jaxdiff.solver.table import Table

__all__ = ["Switch", "stitch", "switch"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Switch:
    """``parts[query.mode]``; build with :func:`switch`."""

    parts: tuple

    @property
    def process(self) -> Any:
        """The first part's process."""
        return getattr(self.parts[0], "process", None)

    def start(self, x: Any) -> tuple:
        """The states of all parts; a part's own moves only on its rows."""
        return tuple(prediction.start(d, x) for d in self.parts)

    def step(self, state: tuple, x: Any, query: Query) -> tuple:
        """``(prediction, state)``: one evaluation, of the part that the row's mode names."""
        if query.mode is None:
            raise ValueError("table: has no modes, and switch() chooses by them; use stitch(table, fraction)")

        def branch(i: int) -> Any:
            def ask(state: tuple, x: Any, query: Query, forms: tuple | None) -> tuple:
                own_query = dataclasses.replace(query, form=None if forms is None else forms[i])
                told, own = evaluate(self.parts[i], state[i], x, own_query)
                return told, (*state[:i], own, *state[i + 1 :])

            return ask

        plain = dataclasses.replace(query, mode=None, form=None)
        return jax.lax.switch(query.mode, [branch(i) for i in range(len(self.parts))], state, x, plain, query.form)

    def tabulate(self, query: Query) -> tuple:
        """Each part's own view of the query, None for parts without; a row's branch takes its part's."""
        return tuple(tabulated(d, dataclasses.replace(query, mode=None)) for d in self.parts)

    def condition(self, cond: Any) -> Switch:
        """The same, every part told ``cond``."""
        return Switch(tuple(prediction.condition(d, cond) for d in self.parts))


def switch(parts: Sequence[Any]) -> Switch:
    """Denoisers of which each row asks the one its ``mode`` names, 0, 1, ... (2402.14167 [245]).

    One branch runs per row: keep ``mode`` out of vmaps (it is static in a table, so ``vmap`` over tables of equal modes
    keeps the branch). All parts share data space and path, and multistep history mixes them at a change.
    Modes beyond the parts ask the last. Raises ValueError for none, for processes of different kinds, and on evaluation
    by a table without modes.
    """
    if not parts:
        raise ValueError("parts: none given; switch() needs at least one denoiser")
    lifted = tuple(lift(d) for d in parts)
    check_one_process(lifted)
    return Switch(lifted)


def stitch(table: Table, fraction: float) -> Table:
    """``table`` whose first rows, ``round(fraction K)`` of them, have mode 0 and the rest mode 1 (2402.14167 [245]).

    With ``switch((small, large))``, fraction 0 is the large model and 1 the small one. Raises ValueError outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction: {fraction} given; stitch() needs 0 <= fraction <= 1")
    cut = int(np.floor(fraction * table.rows + 0.5))
    return dataclasses.replace(table, mode=tuple(int(k >= cut) for k in range(table.rows)))
