"""The train step and the sampler of the shipped configs lower for GPUs and TPUs, which needs none of them.

What is seen here without one: no operation that only a CPU has, donation, the compute dtype, and no array closed over
(lowering would copy it from the device, which the training loop's transfer guard forbids where that is a copy).
"""

import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import config as config_lib
from jaxdiff import solver
from jaxdiff.commands import assemble, layout
from jaxdiff.train import abstract_state, batch_sharding, make_mesh, make_step, replicated
from jaxdiff.train import step as step_module

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"
ACCELERATORS = ("cuda", "tpu")


def setup(name, shape, **given):
    config = config_lib.load(str(CONFIGS / name))
    config_lib.check(config_lib.apply_overrides(config, given))
    return assemble.setup(config, types.SimpleNamespace(shape=shape, num_classes=10))


def traced_step(made, mesh, monkeypatch):
    """The traced step of a config and its abstract arguments, as a run on an accelerator has it."""
    monkeypatch.setattr(step_module, "_branches", lambda mesh: False)
    game, config = assemble.game(made), made.config
    state = abstract_state(game, made.init, mesh, layout.rules(config, mesh.shape["tensor"]), config.mesh.min_bytes)
    step = make_step(
        game, mesh, jax.tree.map(lambda leaf: leaf.sharding, state), parallel=layout.route(config),
        compute_dtype=jnp.bfloat16 if config.train.precision == "bfloat16" else None,
    )  # fmt: skip
    spec = lambda shape, dtype: jax.ShapeDtypeStruct((16, *shape), dtype, sharding=batch_sharding(mesh))
    batch = {"x0": spec(made.shape, jnp.float32), "label": spec((), jnp.int32), "index": spec((), jnp.uint32)}
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))
    return step.jitted.trace(state, batch, key, step.fixed), state


def held_arrays(jaxpr):
    """Arrays on a device that a traced program closed over, wherever inside."""
    found = [c for c in getattr(jaxpr, "consts", ()) if isinstance(c, jax.Array)]
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in inner.eqns:
        found += [v.val for v in equation.invars if hasattr(v, "val") and isinstance(v.val, jax.Array)]
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                found += held_arrays(value)
    return found


CASES = {
    "digits": ("digits.py", (8, 8, 1), {}, 1),
    "mnist on a GPU": ("mnist.py:gpu", (28, 28, 1), {}, 1),
    "DiT, explicit fsdp": (
        "digits.py", (8, 8, 4),
        {"network.name": "dit", "network.width": "64", "network.depth": "2", "network.heads": "2", "mesh.fsdp": "2",
         "mesh.fsdp_mode": "explicit", "mesh.min_bytes": "1024", "train.precision": "bfloat16"}, 2,
    ),
}  # fmt: skip


def made_of(case):
    name, shape, given, devices = CASES[case]
    return setup(name, shape, **given), devices


@pytest.mark.parametrize("case", CASES)
def test_train_step_lowers(case, monkeypatch):
    made, devices = made_of(case)
    mesh = make_mesh(1, made.config.mesh.fsdp, devices=jax.devices()[:devices])
    traced, state = traced_step(made, mesh, monkeypatch)
    assert not held_arrays(traced.jaxpr)
    for platform in ACCELERATORS:
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert not re.findall(r"custom_call @(?!Sharding|SPMD|annotate_device_placement)\w+", text)
        assert text.count("tf.aliasing_output") + text.count("jax.buffer_donor") == len(jax.tree.leaves(state))
        assert ("xbf16>" in text) == (made.config.train.precision == "bfloat16")
        assert "stablehlo.case" not in text and "stablehlo.if" not in text  # no branch that asks the host


@pytest.mark.parametrize("case", ["digits", "mnist on a GPU"])
def test_sampler_lowers(case):
    """Guided, as ``jaxdiff sample`` draws with the config's solver."""
    made, _ = made_of(case)
    table = assemble.table(made)

    def draw(params, key):
        d = assemble.shaped(made, assemble.denoiser(made, params), "cfg", 1.5)
        return solver.sample(table, d, key, (16, *made.shape), cond=jnp.arange(16) % 10)

    key = jax.eval_shape(lambda: jax.random.key(0))
    traced = jax.jit(draw).trace(jax.eval_shape(made.init, key)["model"], key)
    for platform in ACCELERATORS:
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert not re.findall(r"custom_call @(?!Sharding)\w+", text) and "stablehlo.while" in text
        assert ("xbf16>" in text) == (made.config.train.precision == "bfloat16")


def test_arrays_closed_over_are_found():
    """The check of the train step above would see one."""
    held = jnp.arange(3.0)
    inside = jax.jit(lambda x: jax.lax.cond(x[0] > 0, jax.jit(lambda y: y + held), lambda y: y, x))
    assert len(held_arrays(inside.trace(held).jaxpr)) == 1
    assert not held_arrays(jax.jit(lambda x: x + np.arange(3.0)).trace(held).jaxpr)
