"""What a program costs, counted before it runs: FLOPs and saved activations from the jaxpr, collectives from HLO.

One multiply-add is 2 FLOP throughout. XLA's own count reads a loop body once; here a scan counts length times, so
that microbatches and solver rows are all there.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

__all__ = [
    "Collective",
    "activation_bytes",
    "collectives",
    "flops",
    "gradient_flops",
    "nbytes",
    "recomputed_bytes",
    "shard_bytes",
    "traced_collectives",
]

REMAT = ("checkpoint", "remat", "remat2")
BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr", "body_jaxpr")


def _inner(params: dict) -> Iterator[Any]:
    """Jaxprs of a call-like equation (jit, remat, custom derivatives): the first body that is there."""
    for name in BODIES:
        if name in params:
            yield params[name]
            return


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _matmul(equation: Any) -> int:
    """2 FLOP a multiply-add of one dot_general or convolution."""
    left, right = (v.aval.shape for v in equation.invars[:2])
    out = math.prod(equation.outvars[0].aval.shape)
    if equation.primitive.name == "dot_general":
        (contract, _), _ = equation.params["dimension_numbers"]
        return 2 * out * math.prod(left[i] for i in contract)
    # every output value sums over the kernel's window and its input features (already divided by the groups)
    spec = equation.params["dimension_numbers"].rhs_spec
    return 2 * out * math.prod(right[i] for i in spec[1:])


def flops(jaxpr: Any, loops: int = 1) -> int:
    """FLOPs of the matrix products and convolutions of a (closed) jaxpr, over all devices together.

    Scans count length times, ``while`` loops ``loops`` times (their length is not known), the branches of a ``cond`` as
    the most expensive one, and the inside of a ``shard_map`` once a shard. Elementwise work is left out, as in
    every model-FLOPs figure; in a transformer it is below 1 %.
    """
    total = 0
    for equation in _open(jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name in ("dot_general", "conv_general_dilated"):
            total += _matmul(equation)
        elif name == "scan":
            total += params["length"] * flops(params["jaxpr"], loops)
        elif name == "while":
            total += loops * (flops(params["body_jaxpr"], loops) + flops(params["cond_jaxpr"], loops))
        elif name == "cond":
            total += max(flops(branch, loops) for branch in params["branches"])
        elif name == "shard_map":
            shards = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
            total += shards * flops(params["jaxpr"], loops)
        else:
            total += sum(flops(inner, loops) for inner in _inner(params))
    return total


def _run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list:
    """Evaluate a jaxpr with rematerialised parts inlined, as if they had never been marked."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    read = lambda v: v.val if isinstance(v, Literal) else values[v]
    for equation in jaxpr.eqns:
        name, given = equation.primitive.name, [read(v) for v in equation.invars]
        inner: Any = next(_inner(equation.params), None)
        if name in REMAT or name in ("jit", "pjit", "closed_call"):
            out = _run(_open(inner), getattr(inner, "consts", ()), given)
        else:
            params = equation.primitive.get_bind_params(equation.params)
            if name == "scan":
                body = lambda *args, inner=inner: _run(inner.jaxpr, inner.consts, args)
                params = params | {"jaxpr": jax.make_jaxpr(body)(*inner.in_avals)}
            out = equation.primitive.bind(*given, **params)
            out = out if equation.primitive.multiple_results else [out]
        values.update(zip(equation.outvars, out, strict=True))
    return [read(v) for v in jaxpr.outvars]


def gradient_flops(loss: Callable, params: Any, *rest: Any) -> int:
    """FLOPs of the gradient of ``loss(params, *rest)`` (a scalar and aux) that the model asks for.

    What rematerialisation computes a second time is left out, as model-FLOPs utilisation wants it.
    """

    def gradient(params: Any, rest: Any) -> Any:
        def plain(params: Any) -> jax.Array:
            closed = jax.make_jaxpr(lambda p, rest: loss(p, *rest)[0])(params, rest)
            return _run(closed.jaxpr, closed.consts, jax.tree.leaves((params, rest)))[0]

        return jax.grad(plain)(params)

    return flops(jax.make_jaxpr(gradient)(params, rest))


def nbytes(leaf: Any) -> int:
    """Bytes of an array or abstract array; a typed key counts its words."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


def shard_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of ShapeDtypeStructs (or arrays) with shardings."""

    def one(leaf: Any) -> int:
        size = nbytes(leaf)
        if leaf.sharding is None or not leaf.shape:
            return size
        return size * math.prod(leaf.sharding.shard_shape(leaf.shape)) // math.prod(leaf.shape)

    return sum(one(leaf) for leaf in jax.tree.leaves(tree))


def activation_bytes(loss: Callable, params: Any, *rest: Any) -> int:
    """Bytes the forward pass keeps for the gradient of ``loss(params, *rest)`` (a scalar, or a scalar and aux).

    Read off the saved residuals of ``jax.vjp``, rematerialisation policies included: each array once, and
    neither arguments nor constants, which are held anyway. A compiler that recomputes cheap values while fusing
    may keep less; workspace comes on top.
    """

    def residuals(params: Any, rest: Any) -> list:
        def scalar(p: Any) -> Any:
            out = loss(p, *rest)
            return out[0] if isinstance(out, tuple) else out

        return jax.tree.leaves(jax.vjp(scalar, params)[1])

    jaxpr = _open(jax.make_jaxpr(residuals)(params, rest))
    held = {id(v) for v in [*jaxpr.invars, *jaxpr.constvars]}
    kept = {id(v): v for v in jaxpr.outvars if not isinstance(v, Literal) and id(v) not in held}
    return sum(nbytes(v.aval) for v in kept.values())


def recomputed_bytes(loss: Callable, params: Any, *rest: Any) -> int:
    """Saved residuals of the largest rematerialised part of ``loss``: held while the backward pass is inside it."""

    def largest(jaxpr: Any) -> int:
        sizes = [0]
        for equation in _open(jaxpr).eqns:
            inner = next(_inner(equation.params), None)
            if inner is None:
                continue
            sizes.append(largest(inner))
            if equation.primitive.name in REMAT:
                body = jaxpr_as_fun(inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ()))
                shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in _open(inner).invars]
                wide = [jax.numpy.issubdtype(s.dtype, jax.numpy.inexact) for s in shapes]

                def total(floats: list, others: list, body: Any = body, wide: list = wide) -> Any:
                    real, rest = iter(floats), iter(others)
                    out = body(*[next(real if w else rest) for w in wide])
                    return sum(x.astype(jax.numpy.float32).sum() for x in out)

                floats = [s for s, w in zip(shapes, wide) if w]
                sizes.append(activation_bytes(total, floats, [s for s, w in zip(shapes, wide) if not w]))
        return max(sizes)

    return largest(jax.make_jaxpr(loss)(params, *rest))


# ------------------------------------------------------------------------------------------- collectives, from HLO

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
WIDTH = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_OP = re.compile(rf"= (?P<out>\(.*?\)|\S+) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_CALLEE = re.compile(r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program: bytes of its result on one device, devices it spans, runs per call.

    ``axes`` are the mesh axes it spans; () where a compiled program was read without its mesh.
    """

    kind: str
    bytes: int
    group: int
    times: int
    axes: tuple[str, ...] = ()


def _array_bytes(text: str) -> list[int]:
    return [
        WIDTH.get(kind, 1) * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in _ARRAY.findall(text)
    ]


def _group(line: str, devices: int) -> int:
    """Devices in one replica group, in HLO's listed, iota and mesh notations."""
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{('[^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"('\w+')=(\d+)", axes[1])}
        # an axis may be used in part: 'a':(before)size
        used = re.findall(r"('\w+')(?::\(\d+\)(\d+))?", axes[2])
        return math.prod(int(part) if part else sizes[name] for name, part in used)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    return devices


def _iota(shape: str, source: str, order: str | None) -> np.ndarray:
    """Device numbers in HLO's iota notation, ``[shape]<=[source]T(order)``."""
    source_shape = [int(n) for n in source.split(",")]
    ids = np.arange(math.prod(source_shape)).reshape(source_shape)
    ids = ids.transpose([int(n) for n in order.split(",")]) if order else ids
    return ids.reshape([int(n) for n in shape.split(",")])


def _first_group(line: str, count: int) -> np.ndarray | None:
    """Device numbers of one replica group, in each of HLO's notations; None where all are in one, or it is not known."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return np.array([int(n) for n in listed[1].split(",")])
    if iota := re.search(r"replica_groups=\[(\d+,\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        return _iota(*iota.groups())[0]
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{('[^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"('\w+')=(\d+)", named[1])}
        # an axis may be used in part: 'a':(before)size
        parts = re.findall(r"('\w+')(?::\((\d+)\)(\d+))?", named[3])
        used = {name: (int(before or 1), int(part or sizes[name])) for name, before, part in parts}
        order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", named[2]) if named[2] else None
        ids = _iota(str(count), order[1], order[2]) if order else np.arange(count)
        places = []
        for name, size in sizes.items():
            before, part = used.get(name, (1, 1))
            places.append(np.arange(part) * (size // (before * part)))
        return ids.reshape(list(sizes.values()))[np.ix_(*places)].ravel()
    return None


def _spanned(line: str, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes along which the devices of the first replica group differ: devices are numbered by place in the mesh."""
    count = math.prod(sizes.values())
    group = _first_group(line, count)
    if group is None:
        return tuple(name for name, size in sizes.items() if size > 1) if _group(line, count) == count else ()
    places = np.unravel_index(group, tuple(sizes.values()))
    return tuple(name for name, place in zip(sizes, places, strict=True) if len(set(place.tolist())) > 1)


def collectives(hlo: str, devices: int = 1, mesh: Mapping[str, int] | None = None) -> list[Collective]:
    """The collectives of ``compiled.as_text()``, largest first; loops with a known length count as often as they run.

    ``mesh``: sizes of its axes, in order, to tell which of them each one spans.
    """
    lines: dict[str, list[str]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if head := _HEAD.match(line):
            name = head[2]
            lines[name] = []
            entry = name if head[1] else entry
        elif name:
            lines[name].append(line)
    times: dict[str, int] = {}

    def visit(name: str, count: int) -> None:
        times[name] = times.get(name, 0) + count
        for line in lines.get(name, ()):
            callees = _CALLEE.findall(line)
            for branch in _BRANCHES.findall(line):
                callees += [word.strip().lstrip("%") for word in branch.split(",")]
            trips = _TRIPS.search(line)
            for callee in callees:
                if callee in lines:
                    visit(callee, count * (int(trips[1]) if trips else 1))

    visit(entry, 1)
    found = []
    for name, count in times.items():
        for line in lines[name]:
            if op := _OP.search(line):
                sizes = _array_bytes(op["out"])
                # an asynchronous start of these two carries its operands beside its results
                if op["start"] and op["kind"] in ("all-gather", "collective-permute"):
                    sizes = sizes[len(sizes) // 2 :]
                found.append(
                    Collective(
                        op["kind"], sum(sizes), _group(line, devices), count, _spanned(line, mesh) if mesh else ()
                    )
                )
    return sorted(found, key=lambda c: -c.bytes * c.times)


# -------------------------------------------------------------------------------- collectives, as written in a shard_map

TRACED = {
    "psum": "all-reduce",
    "psum2": "all-reduce",
    "psum_invariant": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "ppermute": "collective-permute",
}


def traced_collectives(jaxpr: Any) -> list[Collective]:
    """The collectives that a program itself asks for inside ``shard_map``, largest first; scans count length times.

    These are what every backend is given: in the dtype asked for, before it merges, drops or splits any.
    """
    found: list[Collective] = []

    def walk(jaxpr: Any, times: int, sizes: dict) -> None:
        for equation in _open(jaxpr).eqns:
            name, params = equation.primitive.name, equation.params
            if name in TRACED:
                axes = params.get("axes", params.get("axis_name"))
                over = (axes,) if isinstance(axes, str) else tuple(axes)
                size = sum(nbytes(v.aval) for v in equation.outvars)
                found.append(Collective(TRACED[name], size, math.prod(sizes[a] for a in over), times, over))
            elif name == "scan":
                walk(params["jaxpr"], times * params["length"], sizes)
            elif name == "while":
                walk(params["cond_jaxpr"], times, sizes)
                walk(params["body_jaxpr"], times, sizes)
            elif name == "cond":
                for branch in params["branches"]:
                    walk(branch, times, sizes)
            elif name == "shard_map":
                walk(params["jaxpr"], times, sizes | dict(params["mesh"].shape))
            else:
                for inner in _inner(params):
                    walk(inner, times, sizes)

    walk(jaxpr, 1, {})
    return sorted(found, key=lambda c: -c.bytes * c.times)
