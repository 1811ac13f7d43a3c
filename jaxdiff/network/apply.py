"""Apply functions that can be static metadata: hashable, compared by what they do, so jit does not retrace.

``net.apply`` of an equal linen module is a new object each time it is written, and so is a lambda; used as
static metadata they would compile everything again. `BoundApply` stores the module and the method's name.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from jaxdiff.network.output import NetOut


class BoundApply:
    """A stable, hashable apply function: ``(variables, x_in, c_noise, cond, *, c_noise_r, taps, rngs)``.

    Equal when the owners are equal and the methods have the same name; the hash is computed once. Keyword
    arguments that are None or empty are not passed on, so a plain ``f(params, x, c_noise, cond)`` works. A
    bare array returned by the function becomes ``NetOut(raw=array)``.

    Args:
        owner: a hashable object (a linen module, an NNX graph definition, ...) or a function.
        method: name of the owner's method to call, or None to call the owner itself.
    """

    __slots__ = ("_call", "_hash", "method", "owner")
    owner: Any
    method: str | None
    _call: Callable
    _hash: int

    def __init__(self, owner: Any, method: str | None = None):
        call = owner if method is None else getattr(owner, method)
        try:
            fixed = hash((type(owner), owner, method))
        except TypeError as error:
            raise TypeError(f"apply: {type(owner).__name__} cannot be hashed ({error}); its fields must be") from None
        for name, value in (("owner", owner), ("method", method), ("_call", call), ("_hash", fixed)):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any):
        raise AttributeError(f"BoundApply is frozen; cannot set {name!r}")

    def __reduce__(self):
        return BoundApply, (self.owner, self.method)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: Any) -> bool:
        if self is other:
            return True
        if not isinstance(other, BoundApply) or self._hash != other._hash:
            return False
        return self.method == other.method and type(self.owner) is type(other.owner) and self.owner == other.owner

    def __repr__(self) -> str:
        return f"BoundApply({self.owner!r}, {self.method!r})"

    def __call__(self, variables: Any, x_in: Any, c_noise: Any, cond: Any = None, **keywords: Any) -> NetOut:
        """Call the function with the keywords that say something."""
        kept = {
            k: v for k, v in keywords.items() if not (v is None or (isinstance(v, tuple | dict | list) and not v))
        }
        out = self._call(variables, x_in, c_noise, cond, **kept)
        return out if isinstance(out, NetOut) else NetOut(out, {})


class _Partial:
    """`functools.partial` compared by value: function, arguments, keywords."""

    def __init__(self, partial: functools.partial):
        self.partial = partial
        self.key = (partial.func, partial.args, tuple(sorted(partial.keywords.items())))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Partial) and self.key == other.key

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self.partial(*args, **keywords)


def from_apply(function: Callable) -> BoundApply:
    """Adapt any apply-shaped function ``f(params, x_in, c_noise, cond) -> NetOut or array``.

    Bound methods compare by (object, method name) and partials by value. Plain functions compare by
    identity: define them once; a fresh lambda each call retraces each call.

    Raises:
        TypeError: not callable, or bound to something that cannot be hashed.
    """
    if isinstance(function, BoundApply):
        return function
    if not callable(function):
        raise TypeError(f"apply: expected a function or a linen module, got {type(function).__name__}")
    if isinstance(function, functools.partial):
        return BoundApply(_Partial(function))
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", None)
    if owner is not None and name is not None and not isinstance(owner, type) and hasattr(owner, name):
        return BoundApply(owner, name)
    return BoundApply(function)


def as_apply(thing: Any) -> BoundApply:
    """Turn a linen module, its bound ``.apply``, or any function into a `BoundApply`.

    The first argument of the result is whatever the function takes: for linen modules the *variables* that
    ``net.init`` returned, ``{"params": ...}``, passed around whole.

    Raises:
        TypeError: anything that cannot be called as a network, and an NNX module, which :func:`from_nnx` adapts.
    """
    if isinstance(thing, nn.Module):
        return BoundApply(thing, "apply")
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(thing, nnx.Module):
        raise TypeError(
            f"apply: the NNX module {type(thing).__name__} given; use apply, params = network.from_nnx(module)"
        )
    return from_apply(thing)


class _NnxApply:
    """Rebuilds an NNX module from its static graph definition and calls it."""

    def __init__(self, graph: Any):
        self.graph = graph

    def __hash__(self) -> int:
        return hash(self.graph)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _NnxApply) and self.graph == other.graph

    def __call__(self, params: Any, *args: Any, **keywords: Any) -> Any:
        from flax import nnx

        return nnx.merge(self.graph, params)(*args, **keywords)


def from_nnx(module: Any) -> tuple[BoundApply, Any]:
    """Adapt an NNX module called as ``module(x_in, c_noise, cond)``: returns ``(apply, params)``.

    The parameters leave the module, so that they can be differentiated, averaged and sharded like any tree.

    Raises:
        ValueError: the module holds variables that are not `nnx.Param` (running statistics, random streams):
            a pure apply function cannot update them.
    """
    from flax import nnx

    graph, params, *others = nnx.split(module, nnx.Param, ...)
    extra = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(others[0])]
    if extra:
        raise ValueError(f"from_nnx: {', '.join(extra[:4])} are not nnx.Param; a pure apply cannot carry them")
    return BoundApply(_NnxApply(graph)), params
