"""Training: one jitted, donated step over a device mesh, and a loop around it that loses no work.

``train(game, init, pipeline, steps=...)`` runs a whole training; ``make_step`` is the step alone. A game is
``{name: Player(loss, optimiser)}``, usually of one player.
"""

from jaxdiff.train.checkpoint import Checkpointer
from jaxdiff.train.ema import Average, averages, decay, posthoc_weights, power
from jaxdiff.train.loop import Callback, Outcome, train
from jaxdiff.train.mesh import batch_sharding, make_mesh, put_batch, replicated
from jaxdiff.train.metrics import JsonlWriter, MetricLog, NonFinite, TensorBoardWriter, WandbWriter, Writer
from jaxdiff.train.optimiser import OPTIMISERS, SCHEDULES, optimiser, schedule
from jaxdiff.train.preempt import Preemption
from jaxdiff.train.progress import Progress
from jaxdiff.train.sharding import TENSOR_RULES, leaf_spec, parse_rules, sharding_table, tree_specs
from jaxdiff.train.state import TrainState, abstract_state, create_state, state_shardings
from jaxdiff.train.step import Game, Player, Step, count_flops, example_keys, make_step

__all__ = [
    "Average",
    "Callback",
    "Checkpointer",
    "Game",
    "JsonlWriter",
    "MetricLog",
    "NonFinite",
    "OPTIMISERS",
    "Outcome",
    "Player",
    "Preemption",
    "Progress",
    "SCHEDULES",
    "Step",
    "TENSOR_RULES",
    "TensorBoardWriter",
    "TrainState",
    "WandbWriter",
    "Writer",
    "abstract_state",
    "averages",
    "batch_sharding",
    "count_flops",
    "create_state",
    "decay",
    "example_keys",
    "leaf_spec",
    "make_mesh",
    "make_step",
    "optimiser",
    "parse_rules",
    "posthoc_weights",
    "power",
    "put_batch",
    "replicated",
    "schedule",
    "sharding_table",
    "state_shardings",
    "train",
    "tree_specs",
]
