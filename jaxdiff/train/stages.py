"""A loss cut where its blocks of parameters come into use, so that it can be run, and differentiated, a stage at a time.

The loss is traced. A stage begins at the first operation that reads a block and ends before the first that reads
another; blocks whose uses overlap (a network asked twice, a scan over its layers) share one. What crosses from stage to
stage is read off the trace, so any loss can be cut; how finely depends on how it is written.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr"}


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """Operations that follow each other. Variables are those of the trace.

    Attributes:
        blocks: numbers of the blocks that it reads and no other stage does. leaves: positions of their arrays.
        held, other: what it reads besides, as variables: what the loss's gradient flows through, and the rest.
        passed, made: what it hands on, parted in the same way.
        run: ``(leaves, held, other) -> (passed, made)``, values for these.
    """

    blocks: tuple[int, ...]
    leaves: tuple[int, ...]
    held: tuple
    other: tuple
    passed: tuple
    made: tuple
    run: Callable


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
    """A traced ``loss(params, *rest) -> (scalar, metrics)`` as stages.

    Attributes:
        stages: in order.
        params, rest: variables of the leaves of its arguments. constants: values by variable.
        loss, metrics: variables (or literals) of what it returns. treedef: puts the metrics together.
    """

    stages: tuple[Stage, ...]
    params: tuple
    rest: tuple
    constants: dict
    loss: Any
    metrics: tuple
    treedef: Any


def _open_calls(closed: Any, args: Sequence[Any], owners: Sequence[int | None]) -> list:
    """Evaluate with those jitted parts laid open that read several blocks; ``owners``: the block of each argument."""
    jaxpr = closed.jaxpr
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))
    owner = dict(zip(jaxpr.invars, owners, strict=True))
    read = lambda v: v.val if isinstance(v, Literal) else values[v]
    for equation in jaxpr.eqns:
        name, given = equation.primitive.name, [read(v) for v in equation.invars]
        own = [None if isinstance(v, Literal) else owner.get(v) for v in equation.invars]
        if name in CALLS and len(set(own) - {None}) > 1:
            out = _open_calls(equation.params[CALLS[name]], given, own)
        else:
            out = equation.primitive.bind(*given, **equation.primitive.get_bind_params(equation.params))
            out = out if equation.primitive.multiple_results else [out]
        values.update(zip(equation.outvars, out, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _variables(atoms: Sequence[Any]) -> list:
    return [v for v in atoms if not isinstance(v, Literal)]


def _ranges(jaxpr: Any, owner: dict) -> list[tuple[int, int, set[int]]]:
    """(first, last, blocks) of operations that read them, in order, where ranges that overlap are one."""
    reads: dict[int, list[int]] = {}
    for number, equation in enumerate(jaxpr.eqns):
        for block in {owner[v] for v in _variables(equation.invars) if v in owner}:
            reads.setdefault(block, []).append(number)
    for block in {owner[v] for v in _variables(jaxpr.outvars) if v in owner}:  # handed out as it is
        reads.setdefault(block, []).append(len(jaxpr.eqns))
    merged: list[tuple[int, int, set[int]]] = []
    for first, last, block in sorted((numbers[0], numbers[-1], block) for block, numbers in reads.items()):
        if merged and first <= merged[-1][1]:
            start, end, blocks = merged.pop()
            merged.append((start, max(end, last), blocks | {block}))
        else:
            merged.append((first, last, {block}))
    return merged


def cut(loss: Callable, params: Any, rest: tuple, blocks: Sequence[Sequence[int]]) -> Cut:
    """Cut ``loss(params, *rest) -> (scalar, metrics)`` by blocks of parameters.

    Args:
        params: pytree of arrays or ShapeDtypeStructs. rest: arguments, arrays.
        blocks: for each block the positions of its arrays among the leaves of ``params``.
    """
    given = (params, *rest)
    flat, treedef = jax.tree.flatten(given)
    count = len(jax.tree.leaves(params))
    owners: list[int | None] = [None] * len(flat)
    for number, positions in enumerate(blocks):
        for position in positions:
            owners[position] = number
    traced, out = jax.make_jaxpr(lambda *flat: loss(*jax.tree.unflatten(treedef, flat)), return_shape=True)(*flat)
    closed = jax.make_jaxpr(lambda *flat: _open_calls(traced, flat, owners))(*flat)
    jaxpr = closed.jaxpr
    inputs = jaxpr.invars
    owner = {v: number for v, number in zip(inputs, owners, strict=True) if number is not None}
    flows = _between(jaxpr, inputs[:count], jaxpr.outvars[:1])
    ranges = _ranges(jaxpr, owner) or [(0, 0, set())]
    starts = [0, *(first for first, _, _ in ranges[1:]), len(jaxpr.eqns)]
    stages, later = [], set(_variables(jaxpr.outvars))
    for (_, _, members), start, stop in reversed(list(zip(ranges, starts, starts[1:]))):
        equations = jaxpr.eqns[start:stop]
        made = dict.fromkeys(v for equation in equations for v in equation.outvars)
        read = dict.fromkeys(v for equation in equations for v in _variables(equation.invars) if v not in made)
        leaves = tuple(k for k, number in enumerate(owners) if number in members)
        arrays = [inputs[k] for k in leaves]
        held, other = _parted([v for v in read if v not in arrays], flows)
        passed, kept = _parted([v for v in (*arrays, *made) if v in later], flows)
        part = jaxpr.replace(constvars=(), invars=[*arrays, *held, *other], outvars=[*passed, *kept], eqns=equations)
        run = _runner(part, len(passed))
        stages.append(Stage(tuple(sorted(members)), leaves, held, other, passed, kept, run))
        later |= set(read)
    return Cut(
        stages=tuple(reversed(stages)),
        params=tuple(inputs[:count]),
        rest=tuple(inputs[count:]),
        constants=dict(zip(jaxpr.constvars, closed.consts, strict=True)),
        loss=jaxpr.outvars[0],
        metrics=tuple(jaxpr.outvars[1:]),
        treedef=jax.tree.structure(out[1]),
    )


def _between(jaxpr: Any, inputs: Sequence[Any], outputs: Sequence[Any]) -> set:
    """Floating variables that depend on some input and on which some output depends."""
    floating = lambda variables: {v for v in variables if jnp.issubdtype(v.aval.dtype, jnp.inexact)}
    after, before = floating(inputs), set(_variables(outputs))
    for equation in jaxpr.eqns:
        if not after.isdisjoint(_variables(equation.invars)):
            after |= floating(equation.outvars)
    for equation in reversed(jaxpr.eqns):
        if not before.isdisjoint(equation.outvars):
            before |= set(_variables(equation.invars))
    return after & before


def _parted(variables: Sequence[Any], flows: set) -> tuple[tuple, tuple]:
    return tuple(v for v in variables if v in flows), tuple(v for v in variables if v not in flows)


def _runner(jaxpr: Any, passed: int) -> Callable:
    function = jaxpr_as_fun(ClosedJaxpr(jaxpr, ()))

    def run(*given: Sequence) -> tuple:
        out = function(*(x for part in given for x in part))
        return tuple(out[:passed]), tuple(out[passed:])

    return run
