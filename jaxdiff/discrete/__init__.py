"""Data that is tokens: processes, what training minimises, and the makers of their tables.

``masked`` is absorbing diffusion; ``masked_elbo`` is the bound that a network of its tokens is trained on; ``denoiser`` reads
such a network's logits as the posterior; ``ancestral`` makes the table of the reverse chain, which ``solver.sample`` runs as it
runs any other. ``SCHEDULES`` lists the masking schedules by name, ``WEIGHTINGS`` the objective's.
"""

from jaxdiff.discrete.denoiser import TokenDenoiser, denoiser
from jaxdiff.discrete.masked import SCHEDULES, Bits, Cosine, Mask, Masked, Polynomial, masked
from jaxdiff.discrete.objective import WEIGHTINGS, masked_elbo
from jaxdiff.discrete.steps import ancestral

__all__ = [
    "Bits",
    "Cosine",
    "Mask",
    "Masked",
    "Polynomial",
    "SCHEDULES",
    "TokenDenoiser",
    "WEIGHTINGS",
    "ancestral",
    "denoiser",
    "masked",
    "masked_elbo",
]
