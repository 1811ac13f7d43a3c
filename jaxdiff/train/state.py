"""What training carries from step to step, built under jit in its final layout."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxdiff.train import ema as ema_lib
from jaxdiff.train.sharding import MIN_BYTES, Rule, named, specs_like, tree_specs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TrainState:
    """A pytree; every dictionary is keyed by player name.

    Attributes:
        step: int32 scalar, train steps done. The data position is a function of it.
        params: master parameters.
        opt: optimiser states.
        ema: a tuple of averaged parameters per player, in the order of ``Player.ema`` (may be empty).
        skipped: int32 scalar per player, updates refused because loss or gradient was not finite.
        skipped_in_a_row: the same, counted since that player's last good update.
    """

    step: jax.Array
    params: dict[str, Any]
    opt: dict[str, Any]
    ema: dict[str, tuple[Any, ...]]
    skipped: dict[str, jax.Array]
    skipped_in_a_row: dict[str, jax.Array]


def _build(game: Mapping[str, Any], params: dict[str, Any]) -> TrainState:
    """The state at step 0; copies, so that nothing in it aliases its input or itself."""
    zeros = lambda: {name: jnp.zeros((), jnp.int32) for name in game}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=jax.tree.map(jnp.copy, params),
        opt={name: player.optimiser.init(params[name]) for name, player in game.items()},
        ema={name: ema_lib.start(params[name], player.ema) for name, player in game.items()},
        skipped=zeros(),
        skipped_in_a_row=zeros(),
    )


def _named(game: Mapping[str, Any], params: Any) -> dict[str, Any]:
    """Check that the parameters are keyed by the players' names."""
    if not isinstance(params, Mapping) or set(params) != set(game):
        given = sorted(params) if isinstance(params, Mapping) else type(params).__name__
        raise ValueError(f"init must return parameters keyed by player {sorted(game)}, got {given}")
    return dict(params)


def state_shardings(
    state: TrainState, mesh: Mesh, rules: Sequence[Rule] = (), min_bytes: int = MIN_BYTES
) -> TrainState:
    """NamedShardings of a (possibly abstract) state: one set of path rules for params, EMA and optimiser.

    Rules see the path inside a player's parameters, ``block_0/mlp/kernel``, whatever the player.
    """
    specs = {name: tree_specs(tree, mesh, rules, min_bytes) for name, tree in state.params.items()}
    layout = TrainState(  # the same structure, with a spec in place of every array
        step=P(),  # type: ignore[arg-type]
        params=specs,
        opt={name: specs_like(tree, state.params[name], specs[name]) for name, tree in state.opt.items()},
        ema={name: tuple(specs[name] for _ in trees) for name, trees in state.ema.items()},
        skipped={name: P() for name in state.skipped},  # type: ignore[misc]
        skipped_in_a_row={name: P() for name in state.skipped_in_a_row},  # type: ignore[misc]
    )
    return named(layout, mesh)


def abstract_state(
    game: Mapping[str, Any],
    init: Callable[[jax.Array], dict[str, Any]] | Mapping[str, Any],
    mesh: Mesh,
    rules: Sequence[Rule] = (),
    min_bytes: int = MIN_BYTES,
) -> TrainState:
    """Shapes, dtypes and shardings of the state; allocates and compiles nothing. The target of a restore."""
    build = lambda params: _build(game, _named(game, params))
    if callable(init):
        shapes = jax.eval_shape(lambda key: build(init(key)), jax.eval_shape(lambda: jax.random.key(0)))
    else:
        shapes = jax.eval_shape(build, init)
    layout = state_shardings(shapes, mesh, rules, min_bytes)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, layout
    )


def create_state(
    game: Mapping[str, Any],
    init: Callable[[jax.Array], dict[str, Any]] | Mapping[str, Any],
    key: jax.Array,
    mesh: Mesh,
    rules: Sequence[Rule] = (),
    min_bytes: int = MIN_BYTES,
) -> TrainState:
    """The state at step 0, made under jit with its final shardings: no device ever holds it whole.

    Args:
        game: name -> Player.
        init: ``init(key) -> {name: params}``, or the parameters themselves (which are copied).
        key: typed key for ``init``.
        mesh: the device mesh.
        rules: path rules, see ``jaxdiff.train.sharding``.
        min_bytes: size from which arrays are split over ``fsdp`` automatically.
    """
    target = abstract_state(game, init, mesh, rules, min_bytes)
    layout = jax.tree.map(lambda leaf: leaf.sharding, target)
    if callable(init):
        return jax.jit(lambda k: _build(game, _named(game, init(k))), out_shardings=layout)(key)
    return jax.jit(lambda params: _build(game, params), out_shardings=layout)(_named(game, init))
