"""Guidance: functions from denoisers to denoisers.

``linear_mix`` is the one idea, ``sum_i w_i(t) D_i`` with weights of sum one; ``cfg``, ``cfg_rescale``, ``cfg_pp``,
``autoguidance`` and ``compose`` are its named forms, ``interval`` limits any of them to some noise levels.
``GUIDANCES`` lists by config name those that need one conditional denoiser and a scale.
"""

from jaxdiff.guidance.branches import Cfg, Compose, cfg, cfg_pp, cfg_pp_weight, cfg_rescale, compose
from jaxdiff.guidance.constrain import Constrained, constrain
from jaxdiff.guidance.interval import autoguidance, interval
from jaxdiff.guidance.mix import Mix, Schedule, Window, linear_mix, mix_predictions
from jaxdiff.guidance.nested import Nested, nested
from jaxdiff.guidance.switch import Switch, stitch, switch
from jaxdiff.guidance.threshold import clip, threshold
from jaxdiff.guidance.time_shift import TimeShift, time_shift

__all__ = [
    "Cfg",
    "Compose",
    "Constrained",
    "GUIDANCES",
    "Mix",
    "Nested",
    "Schedule",
    "Switch",
    "TimeShift",
    "Window",
    "autoguidance",
    "cfg",
    "cfg_pp",
    "cfg_pp_weight",
    "cfg_rescale",
    "clip",
    "compose",
    "constrain",
    "interval",
    "linear_mix",
    "mix_predictions",
    "nested",
    "stitch",
    "switch",
    "threshold",
    "time_shift",
]

GUIDANCES = {"cfg": cfg, "cfg_rescale": cfg_rescale, "cfg_pp": cfg_pp}
