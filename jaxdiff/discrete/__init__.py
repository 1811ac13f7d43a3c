"""Data that is tokens: processes, and the makers of their tables.

``masked`` is absorbing diffusion; ``denoiser`` reads a network's logits as the posterior of its tokens; ``ancestral``
makes the table of its reverse chain, which ``solver.sample`` runs as it runs any other. ``SCHEDULES`` lists the masking
schedules by name.
"""

from jaxdiff.discrete.denoiser import TokenDenoiser, denoiser
from jaxdiff.discrete.masked import SCHEDULES, Bits, Cosine, Mask, Masked, Polynomial, masked
from jaxdiff.discrete.steps import ancestral

__all__ = [
    "Bits",
    "Cosine",
    "Mask",
    "Masked",
    "Polynomial",
    "SCHEDULES",
    "TokenDenoiser",
    "ancestral",
    "denoiser",
    "masked",
]
