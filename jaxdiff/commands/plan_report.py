"""A plan as text: bytes, FLOPs and collectives of a device, and what named chips would make of them."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxdiff.commands.plan_count import Plan

__all__ = ["report"]

USABLE = 0.92  # of a chip's memory; the rest is runtime, fragmentation and workspace


def _size(count: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _crosses(found: Any, plan: Plan) -> bool:
    """Whether a collective leaves its slice: only ``data`` does. A compiled one is known by the devices it spans."""
    if plan.slices == 1:
        return False
    data, fsdp, tensor = plan.mesh
    if found.axes:
        return "data" in found.axes
    return found.group not in (fsdp, tensor) or (found.kind == "all-reduce" and found.group == data)


def report(plan: Plan, mfu: float = 0.4) -> str:
    """The plan as text."""
    from jaxdiff.train.chips import CHIPS, communication_seconds

    data, fsdp, tensor = plan.mesh
    lines = [
        f"mesh data={data} x fsdp={fsdp} x tensor={tensor} = {data * fsdp * tensor} devices"
        f"{f' in {plan.slices} slices' if plan.slices > 1 else ''}, "
        f"batch {plan.batch} ({plan.local} on a device at once), {plan.precision}",
        f"parameters            {plan.parameters:,}",
        "",
        "bytes per device",
        f"  parameters          {_size(plan.params_bytes)}",
        f"  optimiser           {_size(plan.opt_bytes)}",
        f"  moving averages     {_size(plan.ema_bytes)}",
        f"  batch               {_size(plan.batch_bytes)}",
        f"  gradients           {_size(plan.gradient_bytes)}   float32, before they are split",
    ]
    if plan.working_bytes:
        lines.append(f"  working parameters  {_size(plan.working_bytes)}   gathered, compute dtype; at most")
    lines += [
        f"  activations         {_size(plan.activation_fixed + plan.activation_each * plan.local)}   saved for the gradient, "
        f"{_size(plan.activation_each)} an example",
        f"  total               {_size(plan.total_bytes)}",
        f"FLOPs per device      {plan.flops / 1e12:.4g} TFLOP a step (2 a multiply-add; matrix products, "
        "recomputation included)",
    ]
    if plan.compiled_arguments is not None:
        lines.append(
            f"arguments             {_size(plan.argument_bytes)} counted, {_size(plan.compiled_arguments)} in the compiled step"
        )
    if plan.collectives is None:
        lines.append("collectives           not compiled")
    else:
        where = (
            "as written; a backend may merge them"
            if plan.traced
            else "compiled for simulated CPU devices; another backend may split or merge them"
        )
        lines.append(f"collectives per step  ({where})")
        grouped: dict[tuple, list] = {}
        for c in plan.collectives:
            row = grouped.setdefault((c.kind, c.group), [0, 0])
            row[0], row[1] = row[0] + c.times, row[1] + c.times * c.bytes
        for (kind, group), (count, size) in grouped.items():
            lines.append(f"  {kind:18}  {count:4d} x over {group} devices, {_size(size)} together")
        if not grouped:
            lines.append("  none")
    lines += [
        "",
        f"estimates at {mfu:.0%} of peak (an assumption; --mfu), ring collectives at link speed, "
        f"{USABLE:.0%} of memory usable",
        f"  {'chip':10}  {'fits':5}  {'memory':>9}  {'compute':>9}  {'network':>9}  {'step':>20}  "
        f"{'examples/s':>10}  largest batch",
    ]
    warnings = []
    for chip in CHIPS:
        room = USABLE * chip.memory
        peak = chip.bf16 if plan.precision == "bfloat16" else chip.float32
        work = plan.flops / (peak * mfu)
        crossing = [c for c in plan.collectives or () if _crosses(c, plan)]
        inside = [c for c in plan.collectives or () if not _crosses(c, plan)]
        outside = dataclasses.replace(chip, link=chip.outer)
        wire = communication_seconds(inside, chip) + communication_seconds(crossing, outside)
        fits = plan.total_bytes <= room
        most = max(0, int((room - plan.fixed_bytes) // max(plan.example_bytes, 1e-9)))
        accumulated = plan.batch // (plan.local * data * fsdp)
        low, high = max(work, wire), work + wire
        step = _time(low) if plan.collectives is None or not wire else f"{_time(low)}..{_time(high)}"
        lines.append(
            f"  {chip.name:10}  {'yes' if fits else 'NO':5}  {_size(chip.memory):>9}  {_time(work):>9}  {_time(wire):>9}  "
            f"{step:>20}  {plan.batch / high:>10.4g}  {most * data * fsdp * accumulated:,}"
        )
        if not fits:
            cure = (
                "a smaller batch, or accumulation, fits"
                if most >= 1
                else "raise mesh.fsdp: the state alone is too large"
            )
            warnings.append(
                f"warning: {_size(plan.total_bytes)} a device does not fit {chip.name} ({_size(room)} usable); {cure}"
            )
    lines += [f"note: {note}" for note in plan.notes] + warnings
    lines.append("step: from network hidden behind compute to none hidden; examples/s at the slower end")
    lines += [f"source: {s}" for s in dict.fromkeys(f"{c.source}" for c in CHIPS)]
    return "\n".join(lines)
