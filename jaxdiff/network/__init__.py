"""Networks: flax.linen modules that know nothing of processes, and adapters for any other.

Every network is called as ``apply(variables, x_in, c_noise, cond, *, c_noise_r=None, taps=(), rngs=None)``
and returns `NetOut` ``(raw, aux)``. ``variables`` is what ``net.init(key, x, c_noise)`` returned, whole.

- ``x_in`` (B, ...); ``c_noise`` () or (B,): preconditioning and the scale of the time input belong to
  `jaxdiff.prediction`, so each network states the scale its ``frequencies`` are made for.
- ``cond``: None, integer labels (B,), or ``{"label": labels}``. With K = ``num_classes`` label K is null;
  ``cond=None`` means null throughout. Labels are dropped in the objective, never here.
- ``c_noise_r``: the second time of flow maps, for networks built with ``two_time=True``.
- ``taps``: names of blocks whose activations come back in ``aux["taps"]``.
"""

import functools
from collections.abc import Callable

from jaxdiff.network.apply import BoundApply, as_apply, from_apply, from_nnx
from jaxdiff.network.attention import SelfAttention
from jaxdiff.network.count import parameter_count, parameter_table
from jaxdiff.network.dit import SIZES, DiT, make_dit
from jaxdiff.network.embedding import Conditioning, fourier_features
from jaxdiff.network.mlp import MLP
from jaxdiff.network.options import construct
from jaxdiff.network.output import NetOut
from jaxdiff.network.unet import UNet

NETWORKS: dict[str, Callable] = {
    "mlp": functools.partial(construct, MLP),
    "unet": functools.partial(construct, UNet),
    "dit": make_dit,
}

__all__ = [
    "NETWORKS",
    "SIZES",
    "BoundApply",
    "Conditioning",
    "DiT",
    "MLP",
    "NetOut",
    "SelfAttention",
    "UNet",
    "as_apply",
    "construct",
    "fourier_features",
    "from_apply",
    "from_nnx",
    "make_dit",
    "parameter_count",
    "parameter_table",
]
