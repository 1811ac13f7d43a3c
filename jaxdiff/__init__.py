"""jaxdiff: functional diffusion and flow generative models in JAX.

Submodules load on first use (PEP 562), so that ``import jaxdiff`` costs nothing and ``jaxdiff --help``
does not import jax.
"""

import importlib

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "config",
    "data",
    "discrete",
    "eval",
    "exact",
    "guidance",
    "metric",
    "network",
    "objective",
    "prediction",
    "process",
    "solver",
    "train",
]
_ROOMS = tuple(name for name in __all__ if name != "__version__")


def __getattr__(name: str):
    """Import a room the first time it is touched."""
    if name in _ROOMS:
        return importlib.import_module(f"jaxdiff.{name}")
    raise AttributeError(f"module 'jaxdiff' has no attribute {name!r}; its rooms are {', '.join(_ROOMS)}")


def __dir__() -> list[str]:
    """List the rooms without importing them."""
    return sorted(__all__)
