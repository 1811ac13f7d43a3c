"""The one train step: jitted, donated, the same for one player or several, one device or a mesh.

Per player, in the game's order::

    keys   = fold_in(fold_in(key, step), index)          one typed key per example, by global index
    grads  = mean over the global batch of d loss / d params
    update = optimiser(grads);  params <- params + update;  ema <- averages(params)

and everything of that player stays bitwise as it was when its loss or gradient norm is not finite.

The global mean is taken one of three ways. When every device holds the parameters whole, the gradient runs
inside ``shard_map``: microbatches are accumulated locally and ONE all-reduce follows the scan. When
parameters are split over ``fsdp`` or ``tensor``, plain jit with sharding constraints lets the compiler
place the collectives, or ``jaxdiff.train.fsdp`` writes out those over ``fsdp``, block by block.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, auto_axes
from jax.sharding import PartitionSpec as P

from jaxdiff.near import near
from jaxdiff.objective.context import Ctx
from jaxdiff.train import cost, fsdp
from jaxdiff.train import ema as ema_lib
from jaxdiff.train.mesh import (
    BATCH_AXES,
    batch_sharding,
    batch_shards,
    check_batch_size,
    is_explicit,
    lay,
    put_replicated,
    replicated,
)
from jaxdiff.train.sharding import is_replicated, without_axis
from jaxdiff.train.state import TrainState

Loss = Callable[[Any, dict, jax.Array, Ctx], tuple[jax.Array, dict]]
PATHS = ("auto", "shard_map", "jit", "fsdp")


@dataclasses.dataclass(frozen=True, eq=False)
class Player:
    """One set of parameters with a loss of its own; ordinary training is a game of one player.

    Attributes:
        loss: ``loss(params, batch, keys, ctx) -> (scalar, metrics)``; the scalar and every metric are means
            over the examples given, so that they can be averaged over microbatches and devices.
        optimiser: an optax transformation.
        period: the player moves at steps 0, period, 2 period, ...
        ema: moving averages kept of its parameters (``ema.averages`` makes the tuple).
        schedule: learning rate by update count, reported as a metric if given (the optimiser has its own).
    """

    loss: Loss
    optimiser: optax.GradientTransformation
    period: int = 1
    ema: tuple[ema_lib.Average, ...] = ()
    schedule: Callable | None = None


Game = dict[str, Player]  # moves are made in this order, each player seeing the moves before its own


def example_keys(step_key: jax.Array, index: jax.Array) -> jax.Array:
    """(B,) typed keys from the step's key and the (B,) global example indices."""
    return jax.vmap(lambda i: jax.random.fold_in(step_key, i))(index)


def _cast(tree: Any, dtype: Any) -> Any:
    """Floating leaves in the compute dtype; None leaves everything as it is."""
    if dtype is None:
        return tree
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _float32(tree: Any) -> Any:
    """Loss, metrics and gradients are reduced in (at least) float32."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def _mean_gradient(differentiated: Callable, accumulate: int, micro: Callable) -> Callable:
    """``(params, batch, step_key, ctx) -> (grads, loss, metrics)``, the mean over ``accumulate`` parts."""

    def once(params: Any, batch: dict, step_key: jax.Array, ctx: Ctx) -> tuple:
        keys = example_keys(step_key, batch["index"])
        (value, metrics), grads = differentiated(params, batch, keys, ctx)
        return _float32((grads, value, metrics))

    def scanned(params: Any, batch: dict, step_key: jax.Array, ctx: Ctx) -> tuple:
        parts = micro(batch)
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(once, params, first, step_key, ctx)
        total = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        add = lambda total, part: (jax.tree.map(jnp.add, total, once(params, part, step_key, ctx)), None)
        total, _ = jax.lax.scan(add, total, parts)
        return jax.tree.map(lambda x: x / accumulate, total)

    return once if accumulate == 1 else scanned


def _device_mean(tree: Any, mesh: Mesh) -> Any:
    """Inside shard_map: the mean over the devices that split the batch.

    One device needs no collective, and the compiler would not drop it: it costs up to 0.08 of a small step on CPU.
    """
    return tree if batch_shards(mesh) == 1 else jax.lax.pmean(tree, BATCH_AXES)


def _cut_local(batch: dict, accumulate: int) -> dict:
    """A device's share of the batch as (accumulate, ...) microbatches."""
    return jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)


def _explicit_gradient(loss: Loss, mesh: Mesh, accumulate: int) -> Callable:
    """Gradient inside shard_map: local scan, then one all-reduce of gradients, loss and metrics together."""
    micro = lambda batch: _cut_local(batch, accumulate)
    local = _mean_gradient(jax.value_and_grad(loss, has_aux=True), accumulate, micro)
    # check_vma=False: a user's scan with a constant carry must not need casts; outputs are pmeans, so P() is true
    return jax.shard_map(
        lambda *args: _device_mean(local(*args), mesh),
        mesh=mesh,
        in_specs=(P(), P(BATCH_AXES), P(), P()),
        out_specs=P(),
        check_vma=False,
    )


def _with_auto_axes(gradient: Callable, mesh: Mesh, layout: Any) -> Callable:
    """The same ``-> (grads, loss, metrics)``, run with Auto axes where the mesh has Explicit ones."""
    if not is_explicit(mesh):
        return gradient
    return auto_axes(gradient, axes=mesh.axis_names, out_sharding=(layout, replicated(mesh), replicated(mesh)))


def _fsdp_gradient(loss: Loss, mesh: Mesh, accumulate: int, layout: Any) -> Callable:
    """Gradient inside shard_map of parameters in pieces: gathered and scattered by block."""
    blocks = fsdp.split_blocks(layout)
    micro = lambda batch: _cut_local(batch, accumulate)
    local = _mean_gradient(fsdp.value_and_grad(loss, blocks), accumulate, micro)

    def gradient(*args: Any) -> tuple:
        grads, *rest = local(*args)
        return fsdp.mean(blocks, grads, args[0]), *_device_mean(rest, mesh)

    pieces = fsdp.pieces_spec(layout)
    mapped = jax.shard_map(
        gradient,
        mesh=None if is_explicit(mesh) else mesh,
        in_specs=(pieces, P(BATCH_AXES), P(), P()),
        out_specs=(pieces, P(), P()),
        axis_names=set(mesh.axis_names) if mesh.shape["tensor"] == 1 else set(BATCH_AXES),
        check_vma=False,
    )
    return _with_auto_axes(mapped, mesh, layout)


def _automatic_gradient(loss: Loss, mesh: Mesh, accumulate: int, layout: Any) -> Callable:
    """Gradient under plain jit: parameters gathered along fsdp before use, gradients split like them."""
    shards = batch_shards(mesh)
    # with Explicit axes this runs under _with_auto_axes, where specs refer to the mesh of the context
    at = (lambda spec: spec) if is_explicit(mesh) else (lambda spec: NamedSharding(mesh, spec))
    split = at(P(None, BATCH_AXES))

    def micro(batch: dict) -> dict:
        # part k takes the k-th piece of every device's share, so that cutting moves no data
        def cut(x: jax.Array) -> jax.Array:
            x = x.reshape(shards, accumulate, -1, *x.shape[1:]).swapaxes(0, 1)
            return jax.lax.with_sharding_constraint(x.reshape(accumulate, -1, *x.shape[3:]), split)

        return jax.tree.map(cut, batch)

    local = _mean_gradient(jax.value_and_grad(loss, has_aux=True), accumulate, micro)
    gathered = jax.tree.map(lambda s: at(without_axis(s.spec, "fsdp")), layout)
    pieces = jax.tree.map(lambda s: at(s.spec), layout)

    def gradient(params: Any, batch: dict, step_key: jax.Array, ctx: Ctx) -> tuple:
        params = jax.lax.with_sharding_constraint(params, gathered)
        grads, value, metrics = local(params, batch, step_key, ctx)
        return jax.lax.with_sharding_constraint(grads, pieces), value, metrics

    return _with_auto_axes(gradient, mesh, layout)


def _blocks(tree: Any) -> dict[str, Any]:
    """Top-level entries of a parameter tree, below a lone collection name such as "params"."""
    while isinstance(tree, Mapping) and len(tree) == 1:
        tree = next(iter(tree.values()))
    return dict(tree) if isinstance(tree, Mapping) else {}


def _norms(**trees: Any) -> dict[str, jax.Array]:
    """Global norm of each tree, and of each of its top-level blocks."""
    out = {}
    for name, tree in trees.items():
        out[f"stats/{name}_norm"] = optax.tree.norm(tree)
        for block, part in _blocks(tree).items():
            out[f"stats/{name}_norm/{block}"] = optax.tree.norm(part)
    return out


def _zeros(function: Callable, *args: Any) -> Any:
    """Zeros of the shape ``function`` would return."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, *args))


def _branches(mesh: Mesh) -> bool:
    """Whether refusing an update is a branch (CPU) rather than a selection."""
    return mesh.devices.flat[0].platform == "cpu"


def _if_good(good: jax.Array, then: Callable, otherwise: Callable, grads: Any, old: Any, mesh: Mesh) -> Any:
    """``then(grads, old)`` where ``good``, bitwise ``otherwise(grads, old)`` where not.

    On accelerators both are computed and selected, which fuses into the update and never asks the host. On CPU
    a branch is cheaper: selecting costs up to 0.16 of a small step there (benchmarks/train_step.py).
    """
    if _branches(mesh):
        return jax.lax.cond(good, then, otherwise, grads, old)
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), then(grads, old), otherwise(grads, old))


def _place(tree: Any, mesh: Mesh) -> Any:
    """Arrays already laid over this mesh stay; anything else is put whole on every device, once."""

    def place(leaf: Any) -> jax.Array:
        sharding = getattr(leaf, "sharding", None)
        laid = isinstance(sharding, NamedSharding) and sharding.mesh == mesh
        return leaf if laid else put_replicated(leaf, mesh)

    return jax.tree.map(place, tree)


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """``step(state, batch, key) -> (state, {name: metrics})``; the state given is donated.

    ``jitted(state, batch, key, fixed)`` is the compiled function (for lowering, counting, exporting);
    ``fixed = (teacher, extra)`` are arrays it reads but never writes.
    """

    jitted: Any
    fixed: tuple

    def __call__(
        self, state: TrainState, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[TrainState, dict[str, dict[str, jax.Array]]]:
        """One train step; returns device arrays without waiting for them."""
        return self.jitted(state, batch, key, self.fixed)

    def lower(self, state: Any, batch: Any, key: Any) -> Any:
        """Lower for shapes (arrays or ShapeDtypeStructs with shardings), without running."""
        return self.jitted.lower(state, batch, key, self.fixed)


def count_flops(
    game: Mapping[str, Player], state: TrainState, batch: Any, teacher: Any = None, extra: Any = None
) -> float:
    """Model FLOPs of one step over all devices, from shapes: every player's gradient on the global batch, per step.

    Matrix products and convolutions, 2 FLOP a multiply-add; recomputation does not count, nor does the optimiser.
    """
    step, params, ema, batch, fixed = jax.eval_shape(
        lambda *x: x, state.step, state.params, state.ema, batch, (teacher, extra)
    )
    averaged = {name: trees[0] for name, trees in ema.items() if trees}
    ctx = Ctx(step=step, players=params, ema=averaged, teacher=fixed[0], extra=fixed[1])
    keys = jax.eval_shape(lambda index: example_keys(jax.random.key(0), index), batch["index"])
    return sum(
        cost.gradient_flops(player.loss, params[name], batch, keys, ctx) / player.period
        for name, player in game.items()
    )


def check_game(game: Mapping[str, Player]) -> None:
    """Refuse an empty game, entries that are not players, and periods below 1."""
    if not isinstance(game, Mapping):
        raise ValueError(f'game: {type(game).__name__} given; need a dict of players, such as {{"net": Player(...)}}')
    if not game:
        raise ValueError("game: at least one player is needed, got none")
    for name, player in game.items():
        if not isinstance(player, Player):
            raise ValueError(f"game[{name!r}] must be a Player, got {type(player).__name__}")
        if isinstance(player.period, bool) or not isinstance(player.period, int) or player.period < 1:
            raise ValueError(f"game[{name!r}].period={player.period!r}: allowed are integers >= 1")
        if not isinstance(player.ema, tuple) or not all(isinstance(a, ema_lib.Average) for a in player.ema):
            raise ValueError(f"game[{name!r}].ema={player.ema!r}: need what train.averages(...) gives")


def make_step(
    game: Mapping[str, Player],
    mesh: Mesh,
    shardings: TrainState | None = None,
    *,
    accumulate: int = 1,
    compute_dtype: Any = None,
    parallel: str = "auto",
    stats_every: int = 0,
    teacher: Any = None,
    extra: Any = None,
) -> Step:
    """Build the jitted, donated step of a game.

    Metrics of a player: what its loss returned, and loss, grad_norm, skipped (0/1: this update was refused),
    skipped_in_a_row, active (0/1: it moved at this step; all its other metrics are zero when it did not),
    learning_rate if it has a schedule, and with ``stats_every`` the norms ``stats/{grad,param,update}_norm``
    whole and per top-level block, measured where ``stats/active`` is 1.

    Args:
        game: name -> Player, moved in this order; each sees the moves made before its own in ``ctx.players``.
        mesh: the device mesh.
        shardings: layout of the state (``state_shardings``); None when every device holds it whole.
        accumulate: microbatches per step. The batch is cut so that each device keeps its own examples.
        compute_dtype: dtype in which losses see parameters (their own, the players', averages, teacher), such
            as ``jnp.bfloat16``; cast once per step. Master parameters, moments and averages are not touched.
        parallel: "shard_map" (losses see each device's examples only), "jit" (losses see the global batch:
            needed by losses that couple examples across it), "fsdp" (as shard_map, of parameters split over fsdp; see
            ``jaxdiff.train.fsdp``), or "auto": shard_map if nothing is split, jit if anything is.
        stats_every: measure norms at every so many steps; 0 is never.
        teacher: frozen pytree given to losses as ``ctx.teacher``.
        extra: frozen pytree given to losses as ``ctx.extra``.

    Raises:
        ValueError: before anything compiles, on a bad game, path name or count; at the first call, before
            compiling, on a batch that the mesh does not divide or that lacks "index".
    """
    check_game(game)
    if parallel not in PATHS:
        raise ValueError(f"parallel={parallel!r}: allowed are {', '.join(PATHS)}{near(parallel, PATHS)}")
    if accumulate < 1:
        raise ValueError(f"accumulate={accumulate}: allowed are integers >= 1")
    if stats_every < 0:
        raise ValueError(f"stats_every={stats_every}: allowed are integers >= 0")
    whole = shardings is None or is_replicated(shardings)
    if parallel == "shard_map" and not whole:
        raise ValueError("parallel='shard_map' needs every parameter whole on every device; use 'jit'")
    explicit = whole if parallel in ("auto", "fsdp") else parallel == "shard_map"
    game = dict(game)

    def gradient_of(name: str, player: Player, params: Any) -> Callable:
        if explicit:
            return _explicit_gradient(player.loss, mesh, accumulate)
        layout = jax.tree.map(lambda _: replicated(mesh), params) if shardings is None else shardings.params[name]
        if parallel == "fsdp":
            return _fsdp_gradient(player.loss, mesh, accumulate, layout)
        return _automatic_gradient(player.loss, mesh, accumulate, layout)

    def move(name: str, key: jax.Array, state: TrainState, batch: dict, fixed: Any) -> tuple:
        """One player's update: (its new params, opt, ema, skipped, in_a_row) and metrics."""
        player = game[name]
        params, opt, ema = state.params[name], state.opt[name], state.ema[name]
        skipped = state.skipped[name]
        averaged = {other: trees[0] for other, trees in state.ema.items() if trees}
        seen = _cast((state.params, averaged, fixed[0]), compute_dtype)
        ctx = Ctx(step=state.step, players=seen[0], ema=seen[1], teacher=seen[2], extra=fixed[1])
        grads, loss, metrics = gradient_of(name, player, params)(seen[0][name], batch, key, ctx)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)

        norm = optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        done = (state.step + player.period - 1) // player.period - skipped  # good updates before this one
        old = (params, opt, ema)

        def apply(grads: Any, old: tuple) -> tuple:
            params, opt, ema = old
            updates, opt = player.optimiser.update(grads, opt, params)
            new = optax.apply_updates(params, updates)
            stats = {}
            if stats_every:
                due = (state.step + 1) % stats_every == 0
                measure = lambda trees: _norms(grad=trees[0], param=trees[1], update=trees[2])
                trees = (grads, params, updates)
                stats = jax.lax.cond(due, measure, lambda trees: _zeros(measure, trees), trees)
                stats["stats/active"] = due.astype(jnp.int32)
            return (new, opt, ema_lib.update(ema, new, player.ema, done + 1)), stats

        kept, stats = _if_good(good, apply, lambda grads, old: (old, _zeros(apply, grads, old)[1]), grads, old, mesh)
        refused = 1 - good.astype(jnp.int32)
        in_a_row = (state.skipped_in_a_row[name] + 1) * refused
        metrics = {
            **metrics,
            **stats,
            "loss": loss,
            "grad_norm": norm,
            "skipped": refused,
            "skipped_in_a_row": in_a_row,
            "active": jnp.ones((), jnp.int32),
        }
        if player.schedule is not None:
            metrics["learning_rate"] = jnp.asarray(player.schedule(done), jnp.float32)
        return (*kept, skipped + refused, in_a_row), metrics

    def advance(
        state: TrainState, batch: dict[str, jax.Array], key: jax.Array, fixed: tuple
    ) -> tuple[TrainState, dict[str, dict[str, jax.Array]]]:
        if set(state.params) != set(game):
            raise ValueError(f"state has players {sorted(state.params)}, the game {sorted(game)}")
        if "index" not in batch:
            raise ValueError(f"batch needs 'index' (global example index), it has {sorted(batch)}")
        check_batch_size(batch["index"].shape[0], mesh, accumulate)
        batch = lay(batch, batch_sharding(mesh), mesh)
        metrics = {}
        for number, (name, player) in enumerate(game.items()):
            # later players draw other keys; counting down from 2^32 cannot meet an int32 step number
            own_key = key if number == 0 else jax.random.fold_in(key, jnp.uint32(2**32 - number))
            step_key = jax.random.fold_in(own_key, state.step)
            play = lambda s, name=name, step_key=step_key: move(name, step_key, s, batch, fixed)

            def rest(s: TrainState, name: str = name, play: Callable = play) -> tuple:
                own = (s.params[name], s.opt[name], s.ema[name], s.skipped[name], s.skipped_in_a_row[name])
                return own, _zeros(play, s)[1]

            if player.period == 1:
                own, metrics[name] = play(state)
            else:
                own, metrics[name] = jax.lax.cond(state.step % player.period == 0, play, rest, state)
            fields = ("params", "opt", "ema", "skipped", "skipped_in_a_row")
            changed = {field: getattr(state, field) | {name: value} for field, value in zip(fields, own)}
            state = dataclasses.replace(state, **changed)
        return dataclasses.replace(state, step=state.step + 1), metrics

    layout = replicated(mesh) if shardings is None else shardings
    jitted = jax.jit(advance, donate_argnums=0, out_shardings=(layout, replicated(mesh)))
    return Step(jitted=jitted, fixed=_place((teacher, extra), mesh))
