"""A benchmark's folder: results.csv, results.json, tables.npz, a ranking in Markdown, error-against-cost pictures.

``results.json`` holds the grids (time, alpha, sigma) and options of every cell, ``tables.npz`` the very tables, so any
row can be made again from its options or run again from its coefficients (:func:`jaxdiff.eval.bench.replay`).
"""

from __future__ import annotations

import csv
import io
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.eval import picture
from jaxdiff.eval.bench import Result, stack_arrays
from jaxdiff.eval.bench_measure import METRICS
from jaxdiff.eval.bench_plan import stochastic
from jaxdiff.eval.table import format_number
from jaxdiff.eval.whole_file import write_whole

__all__ = ["Summary", "half_width", "ranking", "summaries", "write"]

# two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom
STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
SHOWN = 8  # solvers drawn in colour


class Summary(NamedTuple):
    """A cell at one guidance scale over its seeds: ``{metric: (mean, half width of the 95 % interval or None)}``."""

    cell: int
    scale: float | None
    values: dict[str, tuple[float, float | None]]


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % t-interval of a mean; None for a single value."""
    n = len(values)
    if n < 2:
        return None
    t = STUDENT[n - 2] if n - 2 < len(STUDENT) else 1.96 + 2.6 / (n - 1)
    return float(t * np.std(values, ddof=1) / np.sqrt(n))


def summaries(result: Result) -> list[Summary]:
    """Means over seeds. A metric that is missing at one seed (diverged) is missing."""
    groups: dict[tuple, list[dict]] = {}
    for row in result.rows:
        groups.setdefault((row["cell"], row["scale"]), []).append(row)
    out = []
    for (cell, scale), rows in groups.items():
        values = {}
        for metric in METRICS:
            each = [row[metric] for row in rows]
            if all(v is not None for v in each):
                width = half_width(each)
                if width is None and metric == "rms":
                    width = rows[0]["rms_half_width"]
                values[metric] = float(np.mean(each)), width
        out.append(Summary(cell, scale, values))
    return out


def ranking(result: Result, found: Sequence[Summary], metric: str, scale: float | None) -> list[dict[str, Any]]:
    """Solvers by mean rank over budgets; at each budget a solver counts with its best grid.

    ``{solver, rank, best: {budget: (value, grid label, nfe)}}``; a solver without an answer at a budget shares the last rank.
    """
    best: dict[str, dict[int, tuple]] = {}
    for each in found:
        cell = result.cells[each.cell]
        if each.scale == scale and metric in each.values:
            own = best.setdefault(cell.solver.label, {})
            candidate = each.values[metric][0], cell.grid.label, cell.nfe
            if cell.budget not in own or candidate < own[cell.budget]:
                own[cell.budget] = candidate
    budgets = sorted({cell.budget for cell in result.cells})
    ranks: dict[str, list[int]] = {label: [] for label in best}
    for budget in budgets:
        values = {label: own[budget][0] for label, own in best.items() if budget in own}
        for label in best:  # equal values share a rank
            better = sum(value < values[label] for value in values.values()) if label in values else len(best) - 1
            ranks[label].append(1 + better)
    rows = [{"solver": label, "rank": float(np.mean(ranks[label])), "best": best[label]} for label in best]
    return sorted(rows, key=lambda row: (row["rank"], row["solver"]))


def write(result: Result, out: Any, *, config: dict[str, Any] | None = None, title: str = "Solver benchmark") -> None:
    """Write the whole folder; each file is complete or not there."""
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    found = summaries(result)
    write_whole(folder / "results.csv", _csv(result).encode())
    write_whole(folder / "results.json", json.dumps(_json(result, config)).encode())
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **stack_arrays(result.stacks))  # type: ignore[arg-type]
    write_whole(folder / "tables.npz", buffer.getvalue())
    pictures = []
    scales = sorted({row["scale"] for row in result.rows}, key=lambda w: -np.inf if w is None else w)
    for metric in METRICS:
        for scale in scales:
            rows = ranking(result, found, metric, scale)
            if rows:
                name = f"error_{metric}" + ("" if scale is None or len(scales) == 1 else f"_scale{scale:g}") + ".png"
                _plot(result, found, rows, metric, scale, folder / name)
                pictures.append((metric, scale, name))
    write_whole(folder / "report.md", _markdown(result, found, scales, pictures, title).encode())


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _csv(result: Result) -> str:
    """One line a (cell, seed, scale), refused cells with their reason."""
    header = ["solver", "options", "grid", "grid_options", "budget", "steps", "nfe", "kind", "seed", "scale"]
    header += [*METRICS, "rms_half_width", "finite", "reason"]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    by_cell: dict[int, list[dict]] = {}
    for row in result.rows:
        by_cell.setdefault(row["cell"], []).append(row)
    for i, cell in enumerate(result.cells):
        kind = "" if cell.table is None else "stochastic" if stochastic(cell.table) else "deterministic"
        own: list[Any] = [cell.solver.name, _options(cell.solver), cell.grid.name, _options(cell.grid)]
        own += [cell.budget, cell.steps, cell.nfe, kind]
        for row in by_cell.get(i, [{}]):
            reason = cell.reason or (
                "" if row.get("finite", 1.0) == 1.0 else "diverged: samples beyond 1e6 or not finite"
            )
            values = [_short(row.get(name)) for name in ("seed", "scale", *METRICS, "rms_half_width", "finite")]
            writer.writerow([*own, *("" if v is None else v for v in values), reason])
    return stream.getvalue()


def _options(choice: Any) -> str:
    return json.dumps(dict(choice.options), default=str, sort_keys=True) if choice.options else ""


def _json(result: Result, config: dict[str, Any] | None) -> dict[str, Any]:
    grids: dict[str, Any] = {}
    cells = []
    for i, cell in enumerate(result.cells):
        one: dict[str, Any] = {
            "solver": cell.solver.name,
            "options": {k: v if _plain(v) else str(v) for k, v in cell.solver.options.items()},
            "grid": cell.grid.name,
            "grid_options": dict(cell.grid.options),
            "budget": cell.budget,
        }
        if cell.table is None:
            cells.append(one | {"reason": cell.reason})
            continue
        name = f"{cell.grid.label}/{cell.steps}"
        if name not in grids:
            grids[name] = {c: getattr(cell.points, c).tolist() for c in ("time", "alpha", "sigma")}
            grids[name]["on_path"] = cell.points.on_path  # type: ignore[union-attr]
        bucket, position = result.bucket[i]  # type: ignore[misc]
        place = {"bucket": bucket, "position": position, "points": name}
        cells.append(one | {"steps": cell.steps, "nfe": cell.nfe, "stochastic": stochastic(cell.table)} | place)
    rows = []
    for row in result.rows:
        bucket, position = result.bucket[row["cell"]]
        own = {key: _short(value) for key, value in row.items()}
        rows.append(own | {"bucket": bucket, "position": position, "samples": result.facts["samples"]})
    return {
        "facts": result.facts,
        "metrics": METRICS,
        "config": config,
        "cells": cells,
        "grids": grids,
        "rows": rows,
        "seconds": {label: {"nfe": n, "seconds": s} for label, (n, s) in result.seconds.items()},
    }


def _plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _markdown(result: Result, found: Sequence[Summary], scales: list, pictures: list, title: str) -> str:
    facts = result.facts
    budgets = sorted({cell.budget for cell in result.cells})
    rate = facts["wall_seconds"]
    lines = [
        f"# {title}",
        "",
        f"{facts['solvers']} solver variants, {facts['cells']} cells ({facts['run']} run, {facts['refused']} refused), "
        f"{facts['samples']} samples each, {len(result.rows)} results in {rate:.1f} s on {facts['devices']} "
        f"{facts['backend']} device(s).",
        f"Compiled programs: {facts['programs_compiled']} for {facts['buckets']} buckets "
        f"({facts['buckets_run_now']} run now, the others taken from finished parts); "
        f"{facts['all_xla_compiles']} XLA compilations in all, {facts['compile_seconds']:.1f} s.",
        "A cell is the largest number of steps that costs no more than its budget; the cost it had is in brackets where lower.",
        "",
        "Error of the reference end points (RMS distance to half the steps): "
        + ", ".join(f"{name}: {value:.1e}" for name, value in facts["reference_rms_error"].items())
        + "."
        if facts["reference_rms_error"]
        else "",
        "Sliced W2 of as many exact draws (mean ± standard deviation of four sets): "
        + ", ".join(f"{value[0]:.3g} ± {value[1]:.1g}" for value in facts["sliced_w2_floor"].values())
        + ". Differences below that spread are sampling noise.",
        "",
    ]
    for metric, scale, name in pictures:
        lines += _winners(ranking(result, found, metric, scale), metric, scale, budgets)
        lines += ["", f"![{metric} against cost]({name})", ""]
    if result.seconds:
        lines += ["## Wall time", "", "One separate `sample` call, median of five.", ""]
        lines += ["| solver | NFE | ms | ms / NFE |", "|---|--:|--:|--:|"]
        for label, (nfe, seconds) in sorted(result.seconds.items(), key=lambda item: item[1][1] / item[1][0]):
            lines.append(f"| {label} | {nfe} | {1e3 * seconds:.2f} | {1e3 * seconds / nfe:.3f} |")
        lines.append("")
    lines += _failures(result)
    return "\n".join(lines).rstrip() + "\n"


def _winners(rows: list[dict[str, Any]], metric: str, scale: float | None, budgets: list[int]) -> list[str]:
    """The ranking of one metric: each solver's value on its best grid at every budget."""
    at = "" if scale is None else f", guidance scale {scale:g}"
    lines = [f"## {metric}{at}", "", METRICS[metric] + ". Best grid at each budget; ranked by the mean rank.", ""]
    lines += ["| # | solver | mean rank | " + " | ".join(f"NFE ≤ {b}" for b in budgets) + " |"]
    lines += ["|--:|---|--:|" + "---|" * len(budgets)]
    for i, row in enumerate(rows, 1):
        shown = []
        for budget in budgets:
            if budget not in row["best"]:
                shown.append("-")
                continue
            value, grid, nfe = row["best"][budget]
            cost = "" if nfe == budget else f" [{nfe}]"
            shown.append(f"{format_number(value, 3)}{cost} {grid}")
        lines.append(f"| {i} | {row['solver']} | {row['rank']:.1f} | " + " | ".join(shown) + " |")
    return lines


def _failures(result: Result) -> list[str]:
    """Refused cells grouped by reason, then cells whose samples diverged."""
    refused: dict[tuple[str, str], list] = {}
    for cell in result.cells:
        if cell.table is None:
            refused.setdefault((cell.solver.label, cell.reason), []).append(cell)
    lines = []
    if refused:
        lines += ["## Refused cells", "", "| solver | cells | reason |", "|---|---|---|"]
        for (label, reason), cells in refused.items():
            grids = ", ".join(dict.fromkeys(cell.grid.label for cell in cells))
            budgets = ", ".join(str(b) for b in sorted({cell.budget for cell in cells}))
            lines.append(f"| {label} | {len(cells)}: {grids} at NFE {budgets} | {reason.replace('|', '/')} |")
        lines.append("")
    diverged = sorted({row["cell"] for row in result.rows if row["finite"] < 1})
    if diverged:
        lines += ["## Diverged cells", "", "Samples beyond 1e6 or not finite; no metric is given.", ""]
        for i in diverged:
            cell = result.cells[i]
            share = min(row["finite"] for row in result.rows if row["cell"] == i)
            lines.append(f"- {cell.solver.label} on {cell.grid.label}, NFE {cell.nfe}: {share:.1%} of samples finite")
        lines.append("")
    return lines


def _plot(
    result: Result, found: Sequence[Summary], rows: list, metric: str, scale: float | None, path: pathlib.Path
) -> None:
    """One panel a grid: every solver in grey, the best variant of each of the best methods in colour with its 95 % band.

    Dotted: the sliced W2 of exact draws.
    """
    shown: dict[str, str] = {}
    names = {cell.solver.label: cell.solver.name for cell in result.cells}
    for row in rows:
        shown.setdefault(names[row["solver"]], row["solver"])
    coloured = list(shown.values())[:SHOWN]
    grids = list(dict.fromkeys(cell.grid.label for cell in result.cells))
    columns = min(4, len(grids))
    lines = -(-len(grids) // columns)
    figure = picture.new_figure(1.5 + 3.0 * columns, 0.6 + 3.0 * lines)
    panels = np.atleast_1d(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)).ravel()
    curves: dict[tuple[str, str], list] = {}
    for each in found:
        cell = result.cells[each.cell]
        if each.scale == scale and metric in each.values:
            point = cell.nfe, *each.values[metric]
            curves.setdefault((cell.solver.label, cell.grid.label), []).append(point)
    for axes, grid in zip(panels, grids):
        _panel(axes, grid, curves, coloured)
    for axes in panels[len(grids) :]:
        axes.set_visible(False)
    budgets = sorted({cell.budget for cell in result.cells})
    middle = [v for points in curves.values() for _, v, _ in points]
    if metric == "sliced_w2":
        floor = result.facts["sliced_w2_floor"][str(scale)][0]
        for axes in panels[: len(grids)]:
            axes.axhline(floor, color="k", linewidth=0.7, linestyle=":", zorder=2)
    # a cell may cost less than its budget; grey ones may leave the picture
    least = min(
        (nfe for (label, _), points in curves.items() if label in coloured for nfe, _, _ in points), default=1
    )
    panels[0].set_xlim(0.8 * min(least, budgets[0]), 1.1 * budgets[-1])
    panels[0].set_xticks(budgets, [str(b) for b in budgets])
    panels[0].minorticks_off()
    low, high = min(middle), np.quantile(middle, 0.95)
    if low > 0:
        panels[0].set_ylim(0.7 * low, max(2.0 * high, 2 * low))
    for axes in panels[max(0, len(grids) - columns) : len(grids)]:
        axes.set_xlabel("network evaluations", fontsize=9)
    figure.supylabel(metric + ("" if scale is None else f" at guidance scale {scale:g}"), fontsize=9)
    _legend(figure, panels[: len(grids)])
    picture.save_figure(figure, path)


def _panel(axes: Any, grid: str, curves: dict[tuple[str, str], list], coloured: list[str]) -> None:
    """The curves (solver, grid) -> [(nfe, value, half width)] of one grid, on logarithmic axes."""
    for (label, own), points in curves.items():
        if own == grid and label not in coloured:
            nfe, value, _ = zip(*sorted(points))
            axes.plot(nfe, value, color="0.85", linewidth=0.7, zorder=1)
    for k, label in enumerate(coloured):
        points = sorted(curves.get((label, grid), []))
        if not points:
            continue
        nfe, value, width = zip(*points)
        axes.plot(nfe, value, color=f"C{k}", marker="o", markersize=3, linewidth=1.3, zorder=3, label=label)
        if all(w is not None for w in width):
            # a band that reaches 0 would leave a logarithmic axis
            low = np.maximum(np.subtract(value, width), 0.02 * np.asarray(value))
            axes.fill_between(nfe, low, np.add(value, width), color=f"C{k}", alpha=0.2, linewidth=0, zorder=2)
    axes.set_title(grid, fontsize=9)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(alpha=0.25, which="both", linewidth=0.4)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any, panels: Any) -> None:
    """One legend below all panels, each curve once."""
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(4, len(handles)),
        fontsize=7,
        frameon=False,
    )
