"""One network asked under several conditions: classifier-free guidance, its variants, and composition.

How the branches are evaluated (measured on 8 simulated devices, batch 16 sharded; collectives in the compiled
text, compile seconds for a DiT and a UNet):

    separate   called once for each        MLP 0, DiT 0, UNet 0      1.9 s, 2.1 s
    loop       one body, ``lax.map``       MLP 0, DiT 0, UNet 0      0.7 s, 1.7 s
    stacked    ``vmap`` over a new axis    MLP 0, DiT 0, UNet 12     0.8 s, 1.7 s
    (concatenated on the batch axis        MLP 7, DiT 8, UNet 8)

``vmap`` of a convolution merges the new axis into the batch from the outside, which a sharded batch pays for in
all-gathers; it suits networks without convolutions and small batches. "separate" is the default: no
collectives, any conditions, also None; "loop" halves the compile time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.guidance.mix import ask, mix_predictions, scale_at, scale_leaf, tabulated
from jaxdiff.near import unknown
from jaxdiff.prediction import (
    Prediction,
    Query,
    check_labels,
    check_target,
    condition,
    evaluate,
    lift,
    pair,
    start,
    target_of,
)
from jaxdiff.process.coefficients import Coefficients, expand

__all__ = ["Cfg", "Compose", "cfg", "cfg_pp", "cfg_pp_weight", "cfg_rescale", "compose"]

BRANCHES = ("separate", "loop", "stacked")
SPACES = ("vpred", "noise", "data")


def _named(name: str, value: Any, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise unknown(name, value, allowed)
    return value


def _cond_leaf(cond: Any) -> Any:
    """Labels and embeddings as arrays, so that new ones (a list, an int) never compile anything."""
    if isinstance(cond, list | tuple) and all(isinstance(v, int | float | np.number) for v in cond):
        return jnp.asarray(cond)
    return jax.tree.map(_strong, cond)


def _strong(value: Any) -> jax.Array:
    """``value`` as an array whose type is its own: a Python number's would be weak, and compile apart."""
    array = jnp.asarray(value)
    return array.astype(array.dtype) if array.weak_type else array


def _broadcast(null: Any, cond: Any) -> Any:
    """``null`` with the shapes of ``cond`` where their trees agree, so that one null label serves any batch."""
    here: Any = jax.tree.structure(null)
    if here != jax.tree.structure(cond):
        return null
    return jax.tree.map(
        lambda n, c: jnp.broadcast_to(n, jnp.shape(c)) if jnp.ndim(n) < jnp.ndim(c) else n, null, cond
    )


def _evaluate(
    inner: Any, conds: tuple, states: tuple, x: Any, query: Query, how: str, evaluate: Any = evaluate
) -> tuple[list, tuple]:
    """``inner`` under each of ``conds``: the predictions and the new states."""
    if how == "separate":
        outs = [evaluate(condition(inner, cond), state, x, query) for cond, state in zip(conds, states)]
        return [prediction for prediction, _ in outs], tuple(state for _, state in outs)
    shapes = {
        (jax.tree.structure(c), *((jnp.shape(v), jnp.result_type(v)) for v in jax.tree.leaves(c))) for c in conds
    }
    if len(shapes) > 1 or not jax.tree.leaves(conds[0]):
        raise ValueError(
            f"branches: {how!r} given, but the conditions and the null differ in structure, shape or dtype; "
            "use 'separate'"
        )
    one = lambda branch: evaluate(condition(inner, branch[0]), branch[1], x, query)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *zip(conds, states))
    predictions, after = jax.vmap(one)(stacked) if how == "stacked" else jax.lax.map(one, stacked)
    take = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)
    return [take(predictions, i) for i in range(len(conds))], tuple(take(after, i) for i in range(len(conds)))


def _rescale(guided: Prediction, plain: Prediction, phi: Any, space: str, x: Any, query: Query) -> Prediction:
    """``phi std(v_plain)/std(v_guided) v_guided + (1 - phi) v_guided``, the pair re-formed from it at ``x``."""
    if not isinstance(guided, Prediction):
        raise ValueError(f"cfg_rescale: a prediction of type {type(guided).__name__} given; it needs one Prediction")
    if query.alpha is None:
        raise ValueError("cfg_rescale: alpha and sigma are unknown; give it a denoiser with a process")
    c = Coefficients(query.alpha, query.sigma, None, None, None)
    value = target_of(space, c, guided.data, guided.noise)
    reference = target_of(space, c, plain.data, plain.noise)
    axes = tuple(range(1, value.ndim))
    spread = jnp.std(value, axes, keepdims=True)
    ratio = jnp.where(spread > 0, jnp.std(reference, axes, keepdims=True) / jnp.where(spread > 0, spread, 1), 1)
    phi = expand(phi, value)
    # phi = 0 must give back the guided pair itself, also where it is not the pair of one raw output
    again = pair(space, c, x, value * (phi * ratio + (1 - phi)))
    return jax.tree.map(lambda new, old: jnp.where(phi == 0, old, new), again, guided)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Cfg:
    """Classifier-free guidance of ``inner``; build with :func:`cfg`, :func:`cfg_rescale` or :func:`cfg_pp`."""

    inner: Any
    cond: Any
    null: Any
    scale: Any
    phi: Any = None
    space: str = dataclasses.field(default="vpred", metadata={"static": True})
    noise: str = dataclasses.field(default="guided", metadata={"static": True})
    branches: str = dataclasses.field(default="separate", metadata={"static": True})

    @property
    def process(self) -> Any:
        """The inner denoiser's process, None for plain functions."""
        return getattr(self.inner, "process", None)

    def __call__(self, x: Any, t: Any, r: Any = None) -> Any:
        """Predict at state ``x`` (B, ...) and time ``t``."""
        return ask(self, x, t, r)

    def _conds(self) -> tuple:
        if self.cond is None:
            raise ValueError("cond: cfg has none; give cfg(..., cond=labels) or sample(..., cond=labels)")
        return _broadcast(self.null, self.cond), self.cond

    def start(self, x: Any) -> tuple:
        """The states of the unconditional and the conditional branch."""
        return tuple(start(condition(self.inner, cond), x) for cond in self._conds())

    def step(self, state: tuple, x: Any, query: Query) -> tuple:
        """``(prediction, state)``: two evaluations of the inner denoiser."""
        (free, told), state = _evaluate(self.inner, self._conds(), state, x, query, self.branches)
        scale = scale_at(self.scale, query)
        guided = mix_predictions([free, told], [1 - scale, scale])
        if self.phi is not None:
            guided = _rescale(guided, told, self.phi, self.space, x, query)
        if self.noise == "unguided":
            guided = _take_noise(guided, free)
        return guided, state

    @property
    def linear(self) -> bool:
        """As of the inner denoiser, where the guided pair is the mix of the two outputs and no more."""
        return self.phi is None and self.noise == "guided" and getattr(self.inner, "linear", False)

    def raw(self, x: Any, query: Query) -> Any:
        """The guided output ``F_null + w (F_cond - F_null)`` of a linear inner denoiser."""
        output = lambda d, state, x, query: (d.raw(x, query), state)
        (free, told), _ = _evaluate(self.inner, self._conds(), ((), ()), x, query, self.branches, output)
        scale = scale_at(self.scale, query)
        return mix_predictions([free, told], [1 - scale, scale])

    def mean(self, x: Any, raw: Any, form: Any) -> Prediction:
        """What the guided output means at ``x``: the mix of the two means, their weights summing to one."""
        return self.inner.mean(x, raw, form)

    def tabulate(self, query: Query) -> Any:
        """The inner denoiser's own view of the query, which both branches are asked with; None if it has none."""
        return tabulated(self.inner, query)

    def condition(self, cond: Any) -> Cfg:
        """The same with another condition; the null is untouched."""
        return dataclasses.replace(self, cond=_cond_leaf(cond))


def _take_noise(guided: Any, free: Any) -> Any:
    """``data`` of one prediction with ``noise`` of the other, block by block; token blocks have no noise."""
    block = lambda a, b: Prediction(a.data, b.noise) if isinstance(a, Prediction) else a
    return jax.tree.map(block, guided, free, is_leaf=lambda v: isinstance(v, Prediction))


def cfg(
    d: Any, scale: Any, *, cond: Any = None, null: Any = None, noise: str = "guided", branches: str = "separate"
) -> Cfg:
    """Classifier-free guidance: ``D_w = D_null + w (D_cond - D_null)`` (2207.12598).

    The same in data, noise, velocity or score form. **w = 1 is conditional, w = 0 unconditional** (bitwise); the
    paper's own weight is this one minus 1. A negative prompt is another ``null``.

    Args:
        d: a conditional denoiser (with ``.condition``), plain or stateful.
        scale: w, a number, (B,) for one per sample, or a function of the query; an array leaf, so that new values
            do not retrace and ``vmap`` may run over it.
        cond: labels (B,) or any pytree the network takes; may be given later through ``sample(..., cond=)``.
        null: the condition that means none: the null label (an int), an embedding, or None.
        noise: "guided" mixes both members of the pair; "unguided" keeps the unconditional noise, see
            :func:`cfg_pp`.
        branches: how the two are evaluated, see the module: "separate", "loop", "stacked".

    Raises:
        ValueError: unknown names, scales of a wrong shape, labels out of range; on evaluation, no condition.
    """
    noise = _named("noise", noise, ("guided", "unguided"))
    branches = _named("branches", branches, BRANCHES)
    check_labels(d, cond)
    check_labels(d, null, "null")
    return Cfg(lift(d), _cond_leaf(cond), _cond_leaf(null), scale_leaf(scale), None, "vpred", noise, branches)


def cfg_rescale(
    d: Any,
    scale: Any,
    *,
    phi: Any = 0.7,
    space: str = "vpred",
    cond: Any = None,
    null: Any = None,
    branches: str = "separate",
) -> Cfg:
    """Guidance whose result keeps the conditional standard deviation (2305.08891).

    ``v' = phi std(v_cond)/std(v_w) v_w + (1 - phi) v_w`` with std over all but the batch axis; the pair is re-formed
    from v' at the same x. A norm is not linear, so ``space`` matters: "vpred" (the paper's), "noise", "data".
    phi=0 is plain guidance bitwise, phi=1 gives std(v') = std(v_cond). Other arguments: :func:`cfg`.

    Raises:
        ValueError: unknown space; phi outside [0, 1]; space "noise" on a process with alpha(t_max) = 0, where noise
            does not determine the data.
    """
    plain = cfg(d, scale, cond=cond, null=null, branches=branches)
    _named("space", space, SPACES)
    if not isinstance(phi, jax.core.Tracer) and not np.all((np.asarray(phi) >= 0) & (np.asarray(phi) <= 1)):
        raise ValueError(f"phi: {phi} given; cfg_rescale() needs 0 <= phi <= 1")
    if plain.process is not None:
        check_target(space, plain.process)
    return dataclasses.replace(plain, phi=scale_leaf(phi, "phi"), space=space)


def cfg_pp(d: Any, scale: Any, *, cond: Any = None, null: Any = None, branches: str = "separate") -> Cfg:
    """CFG++: guided data with unconditional noise (2406.08070); ``scale`` in [0, 1], 0.6 in the paper.

    ``x_s = alpha_s x0_scale + sigma_s eps_null``. A free pair: exact for one-step rows that use both members
    (ddim, ancestral). For DDIM it equals :func:`cfg` with the step-dependent weight of :func:`cfg_pp_weight`, so it
    has no limit as steps shrink: it belongs to a grid, and adaptive solvers must not be given it.
    """
    return cfg(d, scale, cond=cond, null=null, noise="unguided", branches=branches)


def cfg_pp_weight(scale: Any, half_log_snr: Any, half_log_snr_next: Any) -> Any:
    """The cfg scale equal to CFG++'s under a DDIM step: ``scale / (1 - exp(-(lam_next - lam)))``.

    Diverges as the step shrinks; equals ``scale`` for a step that ends at sigma = 0 (lam_next = inf).
    """
    return scale / -jnp.expm1(half_log_snr - jnp.asarray(half_log_snr_next))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Compose:
    """``D_null + sum_i w_i (D_cond_i - D_null)`` of one network; build with :func:`compose`."""

    inner: Any
    conds: tuple
    null: Any
    scales: tuple
    branches: str = dataclasses.field(metadata={"static": True})

    @property
    def process(self) -> Any:
        """The inner denoiser's process, None for plain functions."""
        return getattr(self.inner, "process", None)

    def __call__(self, x: Any, t: Any, r: Any = None) -> Any:
        """Predict at state ``x`` (B, ...) and time ``t``."""
        return ask(self, x, t, r)

    def _all(self) -> tuple:
        return (_broadcast(self.null, self.conds[0]), *self.conds)

    def start(self, x: Any) -> tuple:
        """The states of the unconditional branch and of every concept's."""
        return tuple(start(condition(self.inner, cond), x) for cond in self._all())

    def step(self, state: tuple, x: Any, query: Query) -> tuple:
        """``(prediction, state)``: one evaluation for every concept and one without."""
        predictions, state = _evaluate(self.inner, self._all(), state, x, query, self.branches)
        scales = [scale_at(scale, query) for scale in self.scales]
        return mix_predictions(predictions, [1 - sum(scales), *scales]), state

    def tabulate(self, query: Query) -> Any:
        """The inner denoiser's own view of the query, which every branch is asked with; None if it has none."""
        return tabulated(self.inner, query)

    def condition(self, conds: Any) -> Compose:
        """The same with other conditions, a tuple of as many as before; the null is untouched."""
        if not isinstance(conds, tuple | list) or len(conds) != len(self.scales):
            given = f"{len(conds)} given" if isinstance(conds, tuple | list) else f"{type(conds).__name__} given"
            raise ValueError(f"cond: {given}; this composition needs a tuple of {len(self.scales)} conditions")
        return dataclasses.replace(self, conds=tuple(_cond_leaf(cond) for cond in conds))


def compose(
    d: Any, conds: Sequence[Any], scales: Sequence[Any], *, null: Any = None, branches: str = "separate"
) -> Compose:
    """Concepts combined by adding their guidance: ``D_null + sum_i w_i (D_cond_i - D_null)`` (2206.01714 [214]).

    w_i > 0 asks for a concept (AND), w_i < 0 against it (NOT). Towards t=0 this is the score of
    ``p(x) prod_i (p(x|c_i)/p(x))^w_i``; at t > 0 it is not the score of that product's diffusion, so samples are
    biased. One concept is :func:`cfg` bitwise. Raises ValueError when counts differ or a scale has a wrong shape.
    """
    conds, scales = tuple(conds), tuple(scales)
    if not conds or len(conds) != len(scales):
        raise ValueError(f"scales: {len(scales)} given for {len(conds)} conditions; need one for each, at least one")
    leaves = tuple(scale_leaf(scale, f"scales[{i}]") for i, scale in enumerate(scales))
    branches = _named("branches", branches, BRANCHES)
    check_labels(d, conds, "conds")
    check_labels(d, null, "null")
    return Compose(lift(d), tuple(_cond_leaf(c) for c in conds), _cond_leaf(null), leaves, branches)
