"""Apply functions as static metadata: equal ones do not retrace, foreign ones plug in."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff.network import MLP, NetOut, as_apply, from_apply, from_nnx

X = jnp.ones((3, 2))


def plain(params, x, c_noise, cond):
    return params["w"] * x


def counted():
    """A jitted caller with the apply function static, and the list its traces are written to."""
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def call(apply, variables, x):
        traces.append(apply)
        return apply(variables, x, 0.5, None).raw

    return call, traces


def test_equal_modules_do_not_retrace():
    call, traces = counted()
    variables = MLP(width=8, depth=1).init(jax.random.key(0), X, 0.5)
    for thing in (MLP(width=8, depth=1), MLP(width=8, depth=1), MLP(width=8, depth=1).apply):
        call(as_apply(thing), variables, X)
    assert len(traces) == 1
    call(as_apply(MLP(width=8, depth=1, time_features=64, two_time=True)), variables, X)
    assert len(traces) == 2  # another module is another program


def test_bare_apply_would_retrace():
    """The reason BoundApply exists: an equal module's own bound method compiles again."""
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def call(apply, variables, x):
        traces.append(apply)
        return apply(variables, x, 0.5).raw

    variables = MLP(width=8, depth=1).init(jax.random.key(0), X, 0.5)
    for _ in range(2):
        call(MLP(width=8, depth=1).apply, variables, X)
    assert len(traces) == 2


def test_hash_equality_and_frozenness():
    a, b = as_apply(MLP(width=8)), as_apply(MLP(width=8).apply)
    assert a == b and hash(a) == hash(b) and a != as_apply(MLP(width=9)) and a != as_apply(plain)
    assert as_apply(a) is a and pickle.loads(pickle.dumps(a)) == a
    assert as_apply(functools.partial(plain, cond=None)) == as_apply(functools.partial(plain, cond=None))
    assert as_apply(functools.partial(plain, cond=None)) != as_apply(functools.partial(plain, cond=1))
    with pytest.raises(AttributeError, match="frozen"):
        a.method = "init"
    with pytest.raises(TypeError, match="expected a function or a linen module, got int"):
        as_apply(3)


def test_the_hash_is_computed_once():
    class Owner:
        hashed = 0

        def __hash__(self):
            Owner.hashed += 1
            return 7

        def __call__(self, params, x, c_noise, cond):
            return x

    apply = as_apply(Owner())
    before = Owner.hashed
    assert {hash(apply) for _ in range(5)} == {hash(apply)}
    assert Owner.hashed == before


def test_plain_functions():
    """Keywords that say nothing are dropped; the ones that do are passed on."""
    apply = from_apply(plain)
    out = apply({"w": 2.0}, X, 0.5, None, c_noise_r=None, taps=(), rngs=None)
    assert isinstance(out, NetOut) and out.aux == {}
    np.testing.assert_array_equal(out.raw, 2 * X)
    with pytest.raises(TypeError, match="c_noise_r"):
        apply({"w": 2.0}, X, 0.5, None, c_noise_r=0.1)
    kept = from_apply(lambda params, x, c_noise, cond, c_noise_r: x * c_noise_r)
    np.testing.assert_array_equal(kept(None, X, 0.5, None, c_noise_r=jnp.asarray(0.0)).raw, 0 * X)


class Tiny(nnx.Module):
    """An NNX network of the expected call shape."""

    def __init__(self, rngs):
        self.layer = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x, c_noise, cond=None):
        t = jnp.broadcast_to(jnp.asarray(c_noise), x.shape[:1])
        return self.layer(jnp.concatenate([x, t[:, None]], axis=-1))


def test_nnx_module():
    module = Tiny(nnx.Rngs(0))
    apply, params = from_nnx(module)
    again, other = from_nnx(Tiny(nnx.Rngs(1)))
    call, traces = counted()
    np.testing.assert_allclose(call(apply, params, X), module(X, 0.5), rtol=1e-6)
    call(again, other, X)
    assert apply == again and len(traces) == 1
    gradient = jax.grad(lambda p: jnp.sum(apply(p, X, 0.5, None).raw))(params)
    np.testing.assert_allclose(gradient["layer"]["bias"][...], [3.0, 3.0])


def test_nnx_module_with_state_is_refused():
    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x, c_noise, cond=None):
            return self.drop(x)

    with pytest.raises(ValueError, match=r"drop.*not nnx\.Param"):
        from_nnx(Noisy(nnx.Rngs(0)))


def test_nnx_module_as_it_is_is_refused():
    with pytest.raises(
        TypeError, match=r"the NNX module Tiny given; use apply, params = network\.from_nnx\(module\)"
    ):
        as_apply(Tiny(nnx.Rngs(0)))
