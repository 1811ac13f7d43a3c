"""Which checkpoints stay: the newest, every so many steps, the best by a metric."""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence

from etils import epath

from jaxdiff.near import near
from jaxdiff.train.checkpoint_read import open_record

__all__ = ["Retention"]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Retention:
    """What to keep.

    Attributes:
        last: how many newest checkpoints; None keeps all.
        every: steps divisible by this; None for no such rule.
        metric: the checkpoint with the best value of this metric; None for no such rule.
        mode: ``"min"`` or ``"max"``, which value is best.

    Raises:
        ValueError: on settings out of range.
    """

    last: int | None
    every: int | None
    metric: str | None
    mode: str

    def __post_init__(self) -> None:
        for name, value in (("keep_last", self.last), ("keep_every", self.every)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"checkpoint.{name}={value!r}: allowed are integers >= 1, or None")
        if self.mode not in ("min", "max"):
            raise ValueError(f"checkpoint.best_mode={self.mode!r}: allowed are 'min' and 'max'")

    def check(self, metrics: Mapping[str, float] | None, step: int) -> None:
        """Warn when a checkpoint that has metrics lacks the one to keep the best by: it can never be the best."""
        if self.metric and metrics and self.metric not in metrics:
            _log.warning(
                "best_metric: %r is not a metric of checkpoint %d%s; there are %s",
                *(self.metric, step, near(self.metric, metrics), ", ".join(sorted(metrics))),
            )

    def best(self, directory: epath.Path, steps: Sequence[int]) -> int | None:
        """The step with the best value of the metric among those there are, the later of two equals, or None."""
        scores = {}
        for step in steps if self.metric else ():
            try:
                value = float(open_record(directory / str(step)).payload["metrics"][self.metric])
            except Exception:  # no such metric, or a damaged record: not the best
                continue
            if math.isfinite(value):
                scores[step] = value if self.mode == "min" else -value
        return min(scores, key=lambda step: (scores[step], -step)) if scores else None

    def surplus(self, directory: epath.Path, steps: Sequence[int]) -> list[int]:
        """The steps, ascending, that nothing keeps."""
        if self.last is None or len(steps) <= self.last:
            return []
        kept = {
            *steps[-self.last :],
            self.best(directory, steps),
            *(s for s in steps if self.every and s % self.every == 0),
        }
        return sorted(set(steps) - kept)
