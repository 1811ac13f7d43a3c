"""Data of several independent parts, each a world of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

__all__ = ["Independent"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Independent:
    """A tree of worlds, one for each part of the data: ``{"image": GaussianMixture(...), "label": enumerable(...)}``."""

    worlds: Any

    @property
    def law(self) -> Any:
        """The noise law that the posteriors are for: one name if all worlds have the same, else the tree of their names."""
        names = self._each(lambda world: getattr(world, "law", "gaussian"))
        one, *others = set(jax.tree_util.tree_leaves(names))
        return names if others else one

    def predict(self, x: Any, alpha: Any, sigma: Any) -> Any:
        """A prediction for every part of ``x``, at its own ``alpha`` and ``sigma``: all trees, as a joined table gives."""
        return self._each(lambda world, *at: world.predict(*at), x, alpha, sigma)

    def _each(self, read: Any, *rest: Any) -> Any:
        return jax.tree_util.tree_map(read, self.worlds, *rest, is_leaf=lambda node: hasattr(node, "predict"))
