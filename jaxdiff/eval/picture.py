"""Pictures as PNG files: sample grids, loss curves, 2-D clouds with trajectories.

Pillow and matplotlib load inside the functions that need them. Paths may be local or buckets (etils.epath); a file
appears whole or not at all.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdiff.eval.whole_file import write_whole

INK, ACCENT, FAINT = "#1f2933", "#2563a8", "#9fb3c8"


def tile(
    samples: Any,
    rows: int,
    cols: int,
    *,
    low: float = -1.0,
    high: float = 1.0,
    scale: int | None = None,
    gap: int = 2,
) -> np.ndarray:
    """The first ``rows * cols`` images as one uint8 array (height, width, 3), filled row by row.

    samples (N, H, W), (N, H, W, 1) or (N, H, W, 3); ``low`` is drawn black and ``high`` white, values outside
    are clipped. Every pixel becomes a square of ``scale`` pixels (None: images of at least 48 pixels), so that
    8x8 images can be seen; cells are ``gap`` pixels apart. Raises ``ValueError`` for too few images or NaN.
    """
    images = np.asarray(samples, np.float32)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"samples: shape {np.shape(samples)}; expected (N, H, W), (N, H, W, 1) or (N, H, W, 3)")
    for name, value, least in (("rows", rows, 1), ("cols", cols, 1), ("gap", gap, 0)):
        if value < least:
            raise ValueError(f"{name}: {value}; allowed >= {least}")
    if not high > low:
        raise ValueError(f"high: {high}; must be above low = {low}")
    if len(images) < rows * cols:
        raise ValueError(f"samples: {len(images)} images; a grid of {rows} x {cols} needs {rows * cols}")
    images = images[: rows * cols]
    if not np.isfinite(images).all():
        raise ValueError("samples: NaN or infinity; a picture needs finite values")
    height, width = images.shape[1:3]
    scale = max(1, -(-48 // min(height, width))) if scale is None else scale
    if scale < 1:
        raise ValueError(f"scale: {scale}; allowed >= 1")
    bytes_ = np.round(np.clip((images - low) / (high - low), 0.0, 1.0) * 255.0).astype(np.uint8)
    bytes_ = np.broadcast_to(bytes_, (*bytes_.shape[:3], 3)).repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = height * scale, width * scale
    canvas = np.full((rows * (height + gap) + gap, cols * (width + gap) + gap, 3), 96, np.uint8)
    for index, image in enumerate(bytes_):
        top = gap + (index // cols) * (height + gap)
        left = gap + (index % cols) * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def image_grid(samples: Any, rows: int, cols: int, path: Any, **options: Any) -> Any:
    """Write ``tile(samples, rows, cols, **options)`` as a PNG file and return its path."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(tile(samples, rows, cols, **options)).save(buffer, format="PNG")
    return write_whole(path, buffer.getvalue())


def new_figure(width: float, height: float) -> Any:
    """A figure that owns its canvas: no global pyplot state, no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Any) -> Any:
    """Write a figure as a PNG file and return its path."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return write_whole(path, buffer.getvalue())


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over a fiftieth of the curve, shortened at the ends rather than padded."""
    half = len(values) // 100
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def loss_curves(curves: Mapping[str, tuple[Any, Any]], path: Any, *, title: str = "", x_label: str = "step") -> Any:
    """Curves against the step as one PNG: ``{name: (steps (N,), values (N,))}``; returns the path.

    Raw values are drawn thin and their running mean thick; the axis is logarithmic when everything is positive
    and spans more than a decade. Non-finite values are left out. Raises ``ValueError`` when nothing is left.
    """
    kept = {}
    for name, (steps, values) in curves.items():
        steps, values = np.asarray(steps, np.float64), np.asarray(values, np.float64)
        if steps.shape != values.shape or steps.ndim != 1:
            raise ValueError(f"curves: {name!r} steps {steps.shape}, values {values.shape}; expected equal (N,)")
        finite = np.isfinite(values)
        if finite.any():
            kept[name] = steps[finite], values[finite]
    if not kept:
        raise ValueError("curves: no finite value to draw")
    figure = new_figure(6.4, 3.6)
    axes = figure.add_subplot()
    for index, (name, (steps, values)) in enumerate(kept.items()):
        colour = f"C{index}"
        if len(values) >= 100:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.6)
        marker = "o" if len(values) == 1 else None
        axes.plot(steps, _smooth(values), color=colour, linewidth=1.6, label=name, marker=marker)
    together = np.concatenate([values for _, values in kept.values()])
    if together.min() > 0 and together.max() > 10 * together.min():
        axes.set_yscale("log")
    axes.set_xlabel(x_label)
    axes.set_ylabel(next(iter(kept)) if len(kept) == 1 else "value")
    if len(kept) > 1:
        axes.legend(frameon=False)
    if title:
        axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, path)


def toy_panels(data: Any, samples: Any, trajectories: Any, path: Any, *, lines: int = 100) -> Any:
    """Data, samples and trajectories of a 2-D problem side by side, on one scale, as a PNG; returns the path.

    data (N, 2), samples (M, 2), trajectories (T, P, 2) from noise to data, of which ``lines`` are drawn. The view
    holds all data and 99.8% of samples and ends of trajectories: one stray point does not shrink the rest. Raises
    ``ValueError`` for other shapes and empty sets.
    """
    data, samples, trajectories = (np.asarray(a, np.float64) for a in (data, samples, trajectories))
    for name, array, ndim in (("data", data, 2), ("samples", samples, 2), ("trajectories", trajectories, 3)):
        if array.ndim != ndim or array.shape[-1] != 2 or array.size == 0:
            shape = "(T, P, 2)" if ndim == 3 else "(N, 2)"
            raise ValueError(f"{name}: shape {array.shape}; expected a non-empty {shape}")
    ends = np.concatenate([samples, trajectories[0], trajectories[-1]])
    low = np.minimum(data.min(axis=0), np.nanquantile(ends, 0.001, axis=0))
    high = np.maximum(data.max(axis=0), np.nanquantile(ends, 0.999, axis=0))
    half = 0.55 * max(float((high - low).max()), 1e-6)
    centre = (low + high) / 2
    figure = new_figure(9.6, 3.5)
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    for axes, name, points in zip(panels, ("data", "samples"), (data, samples)):
        size = float(np.clip(3000 / len(points), 0.3, 6.0))
        axes.scatter(*points.T, s=size, color=INK if name == "data" else ACCENT, linewidths=0)
        axes.set_title(f"{name} ({len(points)})")
    shown = trajectories[:, : min(lines, trajectories.shape[1])]
    panels[2].plot(shown[..., 0], shown[..., 1], color=FAINT, linewidth=0.6)
    panels[2].scatter(*shown[0].T, s=5, color=INK, linewidths=0, zorder=3, label="start")
    panels[2].scatter(*shown[-1].T, s=5, color=ACCENT, linewidths=0, zorder=3, label="end")
    panels[2].set_title("trajectories")
    panels[2].legend(frameon=False, loc="upper right", markerscale=2, handletextpad=0.1)
    for axes in panels:
        axes.set_xlim(centre[0] - half, centre[0] + half)
        axes.set_ylim(centre[1] - half, centre[1] + half)
        axes.set_aspect("equal")
        axes.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, path)
