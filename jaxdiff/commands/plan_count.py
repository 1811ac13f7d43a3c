"""What one training step takes on a mesh of simulated devices: bytes, FLOPs and collectives of one device.

The very step that `jaxdiff train` would run is traced on abstract arrays in their final shardings and compiled ahead of time.
No array is ever made. A mesh larger than the devices is compiled with its data axis cut to fit, at the same batch per device:
what one device holds, computes and sends does not depend on how many replicas there are, only group sizes do, and those
are put back.
"""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any

from ml_collections import ConfigDict

__all__ = ["Plan", "make_plan"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The counts of one device: bytes held, FLOPs a step, collectives a step.

    Attributes:
        mesh: (data, fsdp, tensor). slices: parts of data on a slower network. simulated: the data size compiled with.
        batch: examples a step over all devices; ``local`` of them, a microbatch, are on a device at once.
        parameters: number of scalars.
        params_bytes, opt_bytes, ema_bytes, batch_bytes: arguments of the step on one device.
        argument_bytes: their sum with counters, key and the like.
        gradient_bytes: float32 gradients, whole along fsdp, before they are split or applied.
        working_bytes: parameters as used: gathered along fsdp and in the compute dtype; 0 if the masters serve.
        activation_fixed, activation_each: saved residuals, with those of the largest rematerialised block while it is
            recomputed, are fixed + each * examples.
        flops: matrix-product FLOPs of one step on one device.
        compiled_arguments: argument bytes by XLA's own account; None if not compiled.
        collectives: those of the compiled program or, under explicit fsdp, those written in it with the compiled ones over
            tensor; None if neither.
        traced: whether they are written ones.
        notes: what the reader should know.
    """

    mesh: tuple[int, int, int]
    simulated: int
    batch: int
    local: int
    parameters: int
    params_bytes: int
    opt_bytes: int
    ema_bytes: int
    batch_bytes: int
    argument_bytes: int
    gradient_bytes: int
    working_bytes: int
    activation_fixed: int
    activation_each: float
    flops: int
    compiled_arguments: int | None
    collectives: tuple | None
    precision: str
    notes: tuple[str, ...]
    slices: int = 1
    traced: bool = False

    @property
    def fixed_bytes(self) -> int:
        """What does not grow with the batch."""
        held = self.argument_bytes - self.batch_bytes
        return held + self.gradient_bytes + self.working_bytes + self.activation_fixed

    @property
    def example_bytes(self) -> float:
        """What one more example on a device takes."""
        return self.activation_each + self.batch_bytes / max(self.local, 1)

    @property
    def total_bytes(self) -> float:
        """Bytes on one device at the planned batch."""
        return self.fixed_bytes + self.batch_bytes + self.activation_each * self.local


def make_plan(
    config: ConfigDict,
    mesh_sizes: tuple[int, int, int],
    *,
    shape: tuple[int, ...] | None = None,
    classes: int = 0,
    compiled: bool = True,
    min_bytes: int | None = None,
    rules: Any = (),
) -> Plan:
    """Count one training step of a config on a mesh of simulated devices (all in this process).

    ``rules`` go before the config's and the network's; ``min_bytes`` in place of the config's.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding

    from jaxdiff.commands import assemble, layout
    from jaxdiff.network.count import parameter_count
    from jaxdiff.train import cost
    from jaxdiff.train.mesh import batch_sharding, batch_shards, check_batch_size, make_mesh, replicated
    from jaxdiff.train.sharding import is_replicated, without_axis
    from jaxdiff.train.state import abstract_state
    from jaxdiff.train.step import make_step

    data, fsdp, tensor = mesh_sizes
    simulated = max(1, min(data, len(jax.devices()) // (fsdp * tensor)))
    notes = []
    if simulated < data:
        notes.append(f"compiled with data={simulated} in place of {data}, same batch per device")
    mesh = make_mesh(simulated, fsdp, tensor)
    accumulate = config.train.accumulate
    batch = config.data.batch_size * simulated // data
    check_batch_size(batch, mesh, accumulate)
    shards = batch_shards(mesh)
    local = batch // shards // accumulate

    if shape is None:
        source: Any = assemble.dataset(config, config.data.split)
    else:
        source = types.SimpleNamespace(shape=tuple(shape), num_classes=classes or None)
    made = assemble.setup(config, source)
    game = assemble.game(made)
    rules = (*rules, *layout.rules(config, tensor))
    state = abstract_state(game, made.init, mesh, rules, config.mesh.min_bytes if min_bytes is None else min_bytes)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    dtype = jnp.bfloat16 if config.train.precision == "bfloat16" else None

    whole = _examples(made, batch, batch_sharding(mesh))
    kind = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(kind.shape, kind.dtype, sharding=replicated(mesh))
    route = layout.route(config)
    step = make_step(game, mesh, shardings, accumulate=accumulate, compute_dtype=dtype, parallel=route)

    # FLOPs: the traced step's, over the devices that split the batch; parameters split over tensor divide work too.
    # Inside shard_map, where parameters are whole, what devices along tensor repeat has been counted for each
    jaxpr = jax.make_jaxpr(step.jitted)(state, whole, key, step.fixed)
    total = cost.flops(jaxpr)
    over = lambda axis: any(axis in str(leaf.sharding.spec) for leaf in jax.tree.leaves(state.params))
    split, gathered = over("tensor"), over("fsdp")
    per_device = total // (mesh.size if split or is_replicated(shardings) else shards)
    if tensor > 1 and not split:
        notes.append(
            f"no rule splits anything over tensor={tensor}: its devices repeat the same work; give mesh.rules, or these "
            "devices to data or fsdp"
        )
    elif split:
        notes.append("FLOPs are divided evenly over tensor; activations are counted whole there, which is at most")

    params = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(
            p.shape, dtype if dtype and jnp.issubdtype(p.dtype, jnp.floating) else p.dtype
        ),
        state.params,
    )
    # the coupling may need whole groups, so the two batches are of the microbatch itself
    small, large = (_saved(game["model"].loss, params, _examples(made, n), kind) for n in (local, 2 * local))
    each = (large - small) / local

    program = step.lower(state, whole, key).compile() if compiled else None
    text = None if program is None else program.as_text()
    traced = route == "fsdp" and gathered
    if traced and split:
        notes.append(
            f"collectives over tensor are the compiler's{'' if compiled else ' and not among those counted'}"
        )
    # in use, and as a gradient, a parameter is whole along fsdp and split along tensor alone
    unsplit = lambda sharding: NamedSharding(mesh, without_axis(sharding.spec, "fsdp"))
    used = jax.tree.map(
        lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=unsplit(s)), params, shardings.params
    )
    scalars = sum(cost.shard_bytes(x) // x.dtype.itemsize for x in jax.tree.leaves(used))
    pieces = [cost.shard_bytes(tree) for tree in (state.params, state.opt, state.ema, whole)]
    arguments = cost.shard_bytes((state, whole, key, step.fixed))
    return Plan(
        mesh=mesh_sizes,
        simulated=simulated,
        batch=config.data.batch_size,
        local=local,
        parameters=parameter_count(state.params),
        params_bytes=pieces[0],
        opt_bytes=pieces[1],
        ema_bytes=pieces[2],
        batch_bytes=pieces[3],
        argument_bytes=arguments,
        gradient_bytes=4 * scalars,
        working_bytes=cost.shard_bytes(used) if gathered or dtype is not None else 0,
        activation_fixed=int(np.clip(small - (large - small), 0, None)),
        activation_each=each,
        flops=per_device,
        compiled_arguments=None if program is None else program.memory_analysis().argument_size_in_bytes,
        collectives=_sent(text, jaxpr if traced else None, mesh, mesh_sizes, split),
        precision=config.train.precision,
        notes=tuple(notes),
        slices=config.mesh.slices,
        traced=traced,
    )


def _examples(made: Any, count: int, sharding: Any = None) -> dict[str, Any]:
    """A batch of ``count`` examples, abstract."""
    import jax
    import jax.numpy as jnp

    spec = lambda shape, kind: jax.ShapeDtypeStruct(shape, kind, sharding=sharding)
    out = {"x0": spec((count, *made.shape), jnp.float32), "index": spec((count,), jnp.uint32)}
    return out | ({"label": spec((count,), jnp.int32)} if made.num_classes else {})


def _sent(text: str | None, jaxpr: Any, mesh: Any, planned: tuple[int, int, int], split: bool) -> tuple | None:
    """Collectives of a step, with group sizes of the planned mesh; None where neither source is given.

    ``text``: the program compiled for the simulated ``mesh``. ``jaxpr``: the traced step, where collectives are written in
    it (explicit fsdp): then these, and of the compiled ones those over tensor, if parameters are split over it.
    """
    from jaxdiff.train import cost

    sizes = dict(zip(mesh.axis_names, planned))
    over = lambda axes, sizes: math.prod(sizes[axis] for axis in axes)
    compiled = () if text is None else tuple(cost.collectives(text, mesh.size, mesh.shape))
    if jaxpr is not None:
        written = tuple(dataclasses.replace(c, group=over(c.axes, sizes)) for c in cost.traced_collectives(jaxpr))
        return written + tuple(c for c in compiled if split and c.axes == ("tensor",))
    if text is None:
        return None
    # a group that covers its axes is as large as they will be
    covers = lambda c: c.axes and over(c.axes, mesh.shape) == c.group
    return tuple(dataclasses.replace(c, group=over(c.axes, sizes)) if covers(c) else c for c in compiled)


def _saved(loss: Any, params: Any, batch: Any, key: Any) -> int:
    """Bytes that ``loss`` keeps, and recomputes at once, for its gradient on a batch of these shapes."""
    import jax
    import jax.numpy as jnp

    from jaxdiff.objective.context import Ctx
    from jaxdiff.train import cost
    from jaxdiff.train.step import example_keys

    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    ctx = Ctx(step=step, players=params, ema={}, teacher=None, extra=None)
    whole = lambda p, b, k, c: loss(p, b, example_keys(k, b["index"]), c)
    args = params["model"], batch, jax.ShapeDtypeStruct(key.shape, key.dtype), ctx
    return cost.activation_bytes(whole, *args) + cost.recomputed_bytes(whole, *args)
