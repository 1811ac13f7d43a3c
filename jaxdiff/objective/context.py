"""What a loss may look at besides its own parameters: the step, the other players, averages, a teacher."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Ctx:
    """Context of ``loss(params, batch, keys, ctx) -> (scalar, metrics)``; a pytree, filled by the train step.

    Nothing in it is differentiated: the gradient is taken with respect to ``params`` alone.

    Attributes:
        step: int32 scalar, number of train steps done before this one.
        players: name -> current parameters of every player of the game (the lone player included).
        ema: name -> the first moving average of that player's parameters; players without one are absent.
        teacher: any pytree of frozen arrays (a teacher's parameters), or None.
        extra: any pytree of further frozen arrays (feature-network weights, tables), or None.
    """

    step: jax.Array
    players: dict[str, Any] = dataclasses.field(default_factory=dict)
    ema: dict[str, Any] = dataclasses.field(default_factory=dict)
    teacher: Any = None
    extra: Any = None
