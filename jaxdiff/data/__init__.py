"""Data: named sources, and batches that are a pure function of the step.

``load(name, split)`` gives a :class:`Dataset`; ``pipeline(dataset, batch_size)`` a :class:`Pipeline`, whose
``batch_at(step)`` and ``stream(step)`` give numpy batches ``{"x0", "label", "index", ...}``. Fields of
``config.data``: name, split, data_dir, in_memory (to ``load``); batch_size, seed, flip (to ``pipeline``).
"""

from jaxdiff.data.batches import Pipeline, pipeline
from jaxdiff.data.dataset import Arrays, Dataset, Records, arrays, decode
from jaxdiff.data.families import FAMILIES
from jaxdiff.data.gradual import Gradual, gradual
from jaxdiff.data.levels import from_levels, to_levels
from jaxdiff.data.prepared import tfds
from jaxdiff.data.source import SOURCES, digits, load, npz, toy2d
from jaxdiff.data.stream import Stream

__all__ = [
    "FAMILIES",
    "SOURCES",
    "Arrays",
    "Dataset",
    "Gradual",
    "Pipeline",
    "Records",
    "Stream",
    "arrays",
    "decode",
    "digits",
    "from_levels",
    "gradual",
    "load",
    "npz",
    "pipeline",
    "tfds",
    "to_levels",
    "toy2d",
]
