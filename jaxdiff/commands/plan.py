"""`jaxdiff plan`: what a training would take on a mesh that is not there, from shapes alone.

The parent starts a child process on the CPU platform with as many simulated devices as the mesh has (up to
``MOST``; XLA reads the number once, before jax is imported). The child traces the very step that `jaxdiff train` would
run, on abstract arrays in their final shardings, counts bytes and FLOPs, compiles it ahead of time and reads its
collectives. No array is ever made. A larger mesh is compiled with its data axis cut to fit, at the same batch per device:
what one device holds, computes and sends does not depend on how many replicas there are, only group sizes do, and those
are put back.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import types
from typing import Any

from ml_collections import ConfigDict

from jaxdiff import config as config_lib
from jaxdiff.config import ConfigError

__all__ = ["MOST", "Plan", "make_plan", "parse_mesh", "report", "run"]

MOST = 512  # simulated devices
USABLE = 0.92  # of a chip's memory; the rest is runtime, fragmentation and workspace


def parse_mesh(text: str | None, config: ConfigDict) -> tuple[int, int, int]:
    """``"8x16x1"`` as (data, fsdp, tensor); without text the config's own mesh, which must then be explicit."""
    if text is None:
        sizes = [config.mesh.data, config.mesh.fsdp, config.mesh.tensor]
        if -1 in sizes:
            raise ConfigError(f"mesh: config.mesh is {'x'.join(map(str, sizes))}; give --mesh DATAxFSDPxTENSOR")
    else:
        words = text.split("x")
        if len(words) != 3 or not all(word.isdigit() for word in words):
            raise ConfigError(f"mesh: {text!r} given; need DATAxFSDPxTENSOR, such as 8x16x1")
        sizes = [int(word) for word in words]
    if min(sizes) < 1:
        raise ConfigError(f"mesh: {'x'.join(map(str, sizes))} given; sizes are at least 1")
    data, fsdp, tensor = sizes
    if fsdp * tensor > MOST:
        raise ConfigError(f"mesh: fsdp x tensor = {fsdp * tensor}; at most {MOST} devices are simulated")
    return data, fsdp, tensor


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """``"32x32x4"`` as a tuple."""
    if text is None:
        return None
    words = text.split("x")
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise ConfigError(f"shape: {text!r} given; need sizes such as 32x32x4")
    return tuple(map(int, words))


def run(
    config: ConfigDict,
    mesh: str | None,
    *,
    shape: str | None = None,
    classes: int = 0,
    mfu: float = 0.4,
    compiled: bool = True,
) -> int:
    """Print the plan, counted in a child process with simulated devices; returns its exit status."""
    data, fsdp, tensor = parse_mesh(mesh, config)
    example = parse_shape(shape)
    if not 0 < mfu <= 1:
        raise ConfigError(f"mfu: {mfu} given; need a share in (0, 1]")
    if classes < 0:
        raise ConfigError(f"classes: {classes} given; need at least 0")
    if config.mesh.slices < 1 or data % config.mesh.slices:
        raise ConfigError(f"config.mesh.slices: {config.mesh.slices} given; need a number that divides data={data}")
    shards = data * fsdp
    if config.data.batch_size % (shards * config.train.accumulate):
        raise ConfigError(
            f"config.data.batch_size: {config.data.batch_size} is not divisible by {shards * config.train.accumulate} "
            f"(data x fsdp = {shards} devices, accumulate = {config.train.accumulate})"
        )
    simulated = max(1, min(data, MOST // (fsdp * tensor))) * fsdp * tensor
    kept = [f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
    flags = " ".join([*kept, f"--xla_force_host_platform_device_count={simulated}"])
    request = {
        "config": config.to_dict(),
        "mesh": [data, fsdp, tensor],
        "shape": example,
        "classes": classes,
        "mfu": mfu,
        "compiled": compiled,
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(request, file)
        file.flush()
        return subprocess.run(
            [sys.executable, "-m", "jaxdiff.commands.plan", file.name],
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        ).returncode


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
    from jaxdiff.objective.context import Ctx
    from jaxdiff.train import cost
    from jaxdiff.train.mesh import batch_sharding, batch_shards, check_batch_size, make_mesh, replicated
    from jaxdiff.train.sharding import is_replicated, without_axis
    from jaxdiff.train.state import abstract_state
    from jaxdiff.train.step import example_keys, make_step

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

    def examples(count: int, sharding: Any = None) -> dict[str, Any]:
        spec = lambda shape, kind: jax.ShapeDtypeStruct(shape, kind, sharding=sharding)
        out = {"x0": spec((count, *made.shape), jnp.float32), "index": spec((count,), jnp.uint32)}
        return out | ({"label": spec((count,), jnp.int32)} if made.num_classes else {})

    whole = examples(batch, batch_sharding(mesh))
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

    # activations: what the loss keeps (and recomputes at once) for its gradient at two microbatches;
    # the difference is the share of an example
    params = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(
            p.shape, dtype if dtype and jnp.issubdtype(p.dtype, jnp.floating) else p.dtype
        ),
        state.params,
    )
    count: Any = jax.ShapeDtypeStruct((), jnp.int32)
    ctx = Ctx(step=count, players=params, ema={}, teacher=None, extra=None)
    plain_key = jax.ShapeDtypeStruct(kind.shape, kind.dtype)

    def saved(count: int) -> int:
        loss = lambda p, b, k, c: game["model"].loss(p, b, example_keys(k, b["index"]), c)
        args = params["model"], examples(count), plain_key, ctx
        return cost.activation_bytes(loss, *args) + cost.recomputed_bytes(loss, *args)

    # the coupling may need whole groups, so steps are of the microbatch itself
    small, large = saved(local), saved(2 * local)
    each = (large - small) / local

    compiled_arguments = found = None
    along_tensor: tuple = ()
    if compiled:
        program = step.lower(state, whole, key).compile()
        compiled_arguments = program.memory_analysis().argument_size_in_bytes
        text = program.as_text()
        found = tuple(
            dataclasses.replace(c, group=c.group * data // simulated if c.group == mesh.size else c.group)
            for c in cost.collectives(text, mesh.size)
        )
        along_tensor = tuple(c for c in cost.collectives(text, mesh.size, mesh.shape) if c.axes == ("tensor",))
    if traced := route == "fsdp" and gathered:
        sizes = dict(zip(mesh.axis_names, mesh_sizes))
        written = cost.traced_collectives(jaxpr)
        found = tuple(dataclasses.replace(c, group=math.prod(sizes[a] for a in c.axes)) for c in written)
        if split:
            found += along_tensor
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
        compiled_arguments=compiled_arguments,
        collectives=found,
        precision=config.train.precision,
        notes=tuple(notes),
        slices=config.mesh.slices,
        traced=traced,
    )


def _size(count: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _crosses(found: Any, plan: Plan) -> bool:
    """Whether a collective leaves its slice: only ``data`` does. A compiled one is known by the devices it spans."""
    if plan.slices == 1:
        return False
    data, fsdp, tensor = plan.mesh
    if found.axes:
        return "data" in found.axes
    return found.group not in (fsdp, tensor) or (found.kind == "all-reduce" and found.group == data)


def report(plan: Plan, mfu: float = 0.4) -> str:
    """The plan as text."""
    from jaxdiff.train.chips import CHIPS, communication_seconds

    data, fsdp, tensor = plan.mesh
    lines = [
        f"mesh data={data} x fsdp={fsdp} x tensor={tensor} = {data * fsdp * tensor} devices"
        f"{f' in {plan.slices} slices' if plan.slices > 1 else ''}, "
        f"batch {plan.batch} ({plan.local} on a device at once), {plan.precision}",
        f"parameters            {plan.parameters:,}",
        "",
        "bytes per device",
        f"  parameters          {_size(plan.params_bytes)}",
        f"  optimiser           {_size(plan.opt_bytes)}",
        f"  moving averages     {_size(plan.ema_bytes)}",
        f"  batch               {_size(plan.batch_bytes)}",
        f"  gradients           {_size(plan.gradient_bytes)}   float32, before they are split",
    ]
    if plan.working_bytes:
        lines.append(f"  working parameters  {_size(plan.working_bytes)}   gathered, compute dtype; at most")
    lines += [
        f"  activations         {_size(plan.activation_fixed + plan.activation_each * plan.local)}   saved for the gradient, "
        f"{_size(plan.activation_each)} an example",
        f"  total               {_size(plan.total_bytes)}",
        f"FLOPs per device      {plan.flops / 1e12:.4g} TFLOP a step (2 a multiply-add; matrix products, "
        "recomputation included)",
    ]
    if plan.compiled_arguments is not None:
        lines.append(
            f"arguments             {_size(plan.argument_bytes)} counted, {_size(plan.compiled_arguments)} in the compiled step"
        )
    if plan.collectives is None:
        lines.append("collectives           not compiled")
    else:
        where = (
            "as written; a backend may merge them"
            if plan.traced
            else "compiled for simulated CPU devices; another backend may split or merge them"
        )
        lines.append(f"collectives per step  ({where})")
        grouped: dict[tuple, list] = {}
        for c in plan.collectives:
            row = grouped.setdefault((c.kind, c.group), [0, 0])
            row[0], row[1] = row[0] + c.times, row[1] + c.times * c.bytes
        for (kind, group), (count, size) in grouped.items():
            lines.append(f"  {kind:18}  {count:4d} x over {group} devices, {_size(size)} together")
        if not grouped:
            lines.append("  none")
    lines += [
        "",
        f"estimates at {mfu:.0%} of peak (an assumption; --mfu), ring collectives at link speed, "
        f"{USABLE:.0%} of memory usable",
        f"  {'chip':10}  {'fits':5}  {'memory':>9}  {'compute':>9}  {'network':>9}  {'step':>20}  "
        f"{'examples/s':>10}  largest batch",
    ]
    warnings = []
    for chip in CHIPS:
        room = USABLE * chip.memory
        peak = chip.bf16 if plan.precision == "bfloat16" else chip.float32
        work = plan.flops / (peak * mfu)
        crossing = [c for c in plan.collectives or () if _crosses(c, plan)]
        inside = [c for c in plan.collectives or () if not _crosses(c, plan)]
        outside = dataclasses.replace(chip, link=chip.outer)
        wire = communication_seconds(inside, chip) + communication_seconds(crossing, outside)
        fits = plan.total_bytes <= room
        most = max(0, int((room - plan.fixed_bytes) // max(plan.example_bytes, 1e-9)))
        accumulated = plan.batch // (plan.local * data * fsdp)
        low, high = max(work, wire), work + wire
        step = _time(low) if plan.collectives is None or not wire else f"{_time(low)}..{_time(high)}"
        lines.append(
            f"  {chip.name:10}  {'yes' if fits else 'NO':5}  {_size(chip.memory):>9}  {_time(work):>9}  {_time(wire):>9}  "
            f"{step:>20}  {plan.batch / high:>10.4g}  {most * data * fsdp * accumulated:,}"
        )
        if not fits:
            cure = (
                "a smaller batch, or accumulation, fits"
                if most >= 1
                else "raise mesh.fsdp: the state alone is too large"
            )
            warnings.append(
                f"warning: {_size(plan.total_bytes)} a device does not fit {chip.name} ({_size(room)} usable); {cure}"
            )
    lines += [f"note: {note}" for note in plan.notes] + warnings
    lines.append("step: from network hidden behind compute to none hidden; examples/s at the slower end")
    lines += [f"source: {s}" for s in dict.fromkeys(f"{c.source}" for c in CHIPS)]
    return "\n".join(lines)


def _child(path: str) -> int:
    with open(path) as file:
        request = json.load(file)
    config = config_lib.default()
    for section, value in request["config"].items():
        if isinstance(value, dict):
            for name, item in value.items():
                config[section][name] = item
        else:
            config[section] = value
    try:
        made = make_plan(
            config,
            tuple(request["mesh"]),
            shape=request["shape"] and tuple(request["shape"]),
            classes=request["classes"],
            compiled=request["compiled"],
        )
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"jaxdiff plan: {error}", file=sys.stderr)
        return 2
    print(report(made, request["mfu"]))
    return 0


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1]))
