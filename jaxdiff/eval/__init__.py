"""eval: how good are the samples? Distances with their floor, class agreement, memorisation, pictures and tables."""

from jaxdiff.eval.agreement import agreement_of_logits, class_agreement
from jaxdiff.eval.classifier import digits_network
from jaxdiff.eval.discrepancy import Kid, kid, mmd
from jaxdiff.eval.frechet import Moments, frechet_distance, frechet_from_moments, moments
from jaxdiff.eval.manifold import Memorisation, PrecisionRecall, memorisation, precision_recall
from jaxdiff.eval.picture import image_grid, loss_curves, tile, toy_panels
from jaxdiff.eval.report import FEATURES, default_network, report, report_table
from jaxdiff.eval.table import format_number, format_table
from jaxdiff.eval.transport import directions, sliced_wasserstein, wasserstein_1d

__all__ = [
    "FEATURES",
    "Kid",
    "Memorisation",
    "Moments",
    "PrecisionRecall",
    "agreement_of_logits",
    "class_agreement",
    "default_network",
    "digits_network",
    "directions",
    "format_number",
    "format_table",
    "frechet_distance",
    "frechet_from_moments",
    "image_grid",
    "kid",
    "loss_curves",
    "memorisation",
    "mmd",
    "moments",
    "precision_recall",
    "report",
    "report_table",
    "sliced_wasserstein",
    "tile",
    "toy_panels",
    "wasserstein_1d",
]
