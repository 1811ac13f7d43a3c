"""Data of several parts, each corrupted by a process of its own at one common time."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax

from jaxdiff.process.coefficients import Coefficients

__all__ = ["JointLaw", "PerLeaf", "per_leaf"]


def _is_part(node: Any) -> bool:
    return hasattr(node, "corrupt") or (hasattr(node, "sample") and hasattr(node, "name"))


def _each(parts: Any, read: Callable, *rest: Any) -> Any:
    """``read`` of every process or law of a tree, with the subtrees of ``rest`` at its place."""
    return jax.tree_util.tree_map(read, parts, *rest, is_leaf=_is_part)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class JointLaw:
    """Independent noise laws, one a leaf."""

    laws: Any

    @property
    def name(self) -> Any:
        """The laws' name if they have one, else the tree of their names."""
        names = _each(self.laws, lambda law: law.name)
        one, *others = set(jax.tree_util.tree_leaves(names))
        return names if others else one

    @property
    def gaussian(self) -> bool:
        """Whether every leaf's noise is Gaussian."""
        return all(jax.tree_util.tree_leaves(_each(self.laws, lambda law: law.gaussian)))

    def sample(self, key: jax.Array, shape: Any, dtype: Any) -> Any:
        """One draw (one example) for trees of shapes and dtypes; leaf i, in tree order, draws with ``fold_in(key, i)``."""
        leaf = itertools.count()
        draw = lambda law, s, kind: law.sample(jax.random.fold_in(key, next(leaf)), tuple(s), kind)
        return _each(self.laws, draw, shape, dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PerLeaf:
    """A tree of processes, one for each array of the data, at one time ``t``; build with :func:`per_leaf`.

    It answers as a :class:`~jaxdiff.process.Process` does, with a tree where that has an array: ``coefficients(t).alpha`` is
    ``{"image": ..., "label": ...}``, which is also what a joined table's rows tell a denoiser.
    """

    parts: Any
    t_max: float = dataclasses.field(metadata={"static": True})

    @property
    def name(self) -> Any:
        """The processes' names, as a tree."""
        return _each(self.parts, lambda p: p.name)

    @property
    def noise(self) -> JointLaw:
        """The law of what :meth:`corrupt` adds."""
        return JointLaw(_each(self.parts, lambda p: p.noise))

    @property
    def prior(self) -> JointLaw:
        """The law a sampler starts from."""
        return JointLaw(_each(self.parts, lambda p: p.prior))

    def coefficients(self, t: Any) -> Coefficients:
        """Every process's coefficients at ``t``: each field a tree."""
        found = _each(self.parts, lambda p: p.coefficients(t))
        is_found = lambda node: isinstance(node, Coefficients)
        read = lambda name: jax.tree_util.tree_map(lambda c: getattr(c, name), found, is_leaf=is_found)
        return Coefficients(**{field.name: read(field.name) for field in dataclasses.fields(Coefficients)})

    def corrupt(self, x0: Any, n: Any, t: Any) -> Any:
        """``x_t``, leaf by leaf, from data ``x0``, noise ``n`` of ``noise`` and times ``t`` () or (B,)."""
        return _each(self.parts, lambda p, data, noise: p.corrupt(data, noise, t), x0, n)


def per_leaf(parts: Any) -> PerLeaf:
    """The process of data that is a tree, from a tree of processes with one for each array.

    Raises ValueError where there is none, and where their t_max differ: time is common to all.
    """
    processes = jax.tree_util.tree_leaves(parts, is_leaf=_is_part)
    if not processes or not all(hasattr(p, "corrupt") for p in processes):
        raise ValueError(f"parts: {parts!r} given; need a tree of processes, such as {{'image': linear()}}")
    ends = {p.t_max for p in processes}
    if len(ends) > 1:
        raise ValueError(f"parts: t_max {', '.join(map(str, sorted(ends)))} given; processes of one state share it")
    return PerLeaf(parts, processes[0].t_max)
