"""What each sample of a batch may have of its own: its start, its condition, its guidance scale, its time."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import exact, guidance, process, solver
from jaxdiff.prediction import denoiser
from jaxdiff.solver import grid

KEY = jax.random.key(0)
LINEAR = process.linear()
WORLD = exact.GaussianMixture([0.3, 0.7], [[-1.0, 0.0], [1.0, 0.5]], [0.2, 0.1], labels=np.array([0, 1]))


def test_image_to_image_keeps_of_its_start_what_the_noise_leaves():
    """Data N(mu, s^2) noised to t and carried back by the exact flow ``x -> mu + s (x - alpha mu)/d``, ``d^2 = alpha^2 s^2
    + sigma^2``: the law of data again, correlated ``alpha s/d`` with the start; 0 from pure noise."""
    count, mean, s, t = 4000, 0.7, 0.5, 0.4
    init = mean + s * jax.random.normal(jax.random.key(1), (count, 1))
    d = exact.denoiser(exact.Gaussian([mean], s**2), LINEAR)
    table = solver.heun(LINEAR, np.linspace(t, 0, 33))
    out = np.asarray(solver.sample(table, d, KEY, (count, 1), init=init))
    want = (1 - t) * s / np.hypot((1 - t) * s, t)
    assert abs(np.corrcoef(out[:, 0], init[:, 0])[0, 1] - want) < 4 * (1 - want**2) / np.sqrt(count)
    np.testing.assert_allclose([out.mean(), out.std()], [mean, s], atol=4 * s / np.sqrt(count))
    fresh = np.asarray(solver.sample(solver.heun(LINEAR, grid.uniform(LINEAR, 32)), d, KEY, (count, 1), init=init))
    assert abs(np.corrcoef(fresh[:, 0], init[:, 0])[0, 1]) < 4 / np.sqrt(count)


def test_every_sample_has_its_own_condition_and_guidance_scale():
    d = exact.denoiser(WORLD, LINEAR)
    table = solver.dpm_solver_pp(LINEAR, grid.uniform(LINEAR, 12))
    labels, scales = jnp.array([0, 1, 0, 1]), jnp.array([0.0, 1.0, 2.5, 0.5])
    draw = lambda scale, cond: np.asarray(
        solver.sample(table, guidance.cfg(d, scale, null=jnp.int32(-1)), KEY, (4, 2), cond=cond)
    )
    mixed = draw(scales, labels)
    for i in range(4):
        np.testing.assert_allclose(mixed[i], draw(scales[i], jnp.full(4, labels[i]))[i], atol=1e-5)
    assert np.abs(mixed - draw(1.0, labels)).max(1)[[0, 2, 3]].min() > 1e-3


def test_frames_of_one_sample_may_stand_at_their_own_times():
    """A (B, F) time reaches the network and the formulas as frame-by-frame calls would."""
    frames = np.array([[0.1, 0.5, 0.9], [0.9, 0.3, 0.3]], np.float32)
    x = jax.random.normal(KEY, (2, 3, 4))
    net = lambda params, x, t, cond: jnp.tanh(x) * jnp.reshape(t, jnp.shape(t) + (1,) * (x.ndim - jnp.ndim(t)))
    for path, target in ((LINEAR, "velocity"), (process.vp(), "vpred"), (process.edm(), "edm")):
        d = denoiser(path, net, target=target)
        together = d(x, jnp.asarray(frames))
        for f in range(3):
            alone = d(x[:, f], jnp.asarray(frames[:, f]))
            np.testing.assert_allclose(together.data[:, f], alone.data, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(together.noise[:, f], alone.noise, rtol=1e-5, atol=1e-5)
