"""A few accelerators by their published figures, and what a step would take on them."""

import dataclasses
from collections.abc import Sequence

from jaxdiff.train.cost import Collective

__all__ = ["CHIPS", "Chip", "communication_seconds", "peak_flops"]


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip.

    Attributes:
        name: as sold.
        bf16, float32: peak dense FLOP/s of matrix products, as JAX's default precision runs them (float32 operands are
            TF32 on these GPUs and bfloat16 passes on TPUs).
        memory: bytes of HBM.
        link: bytes/s one way between neighbours of the fast network (half the published two-way figure).
        domain: chips that share it; a group larger than this is bound by ``outer``.
        outer: bytes/s one way and chip between domains.
        source: where the figures come from, and which of them nobody has checked.
        kinds: how JAX calls it (``Device.device_kind``).
    """

    name: str
    bf16: float
    float32: float
    memory: float
    link: float
    domain: int
    outer: float
    source: str
    kinds: tuple[str, ...] = ()


# FLOP/s (dense) and NVLink (900 GB/s two-way) from the first page, which says that the H200 computes as the H100 does; memory
# and NVLink again from the second. They differ on the H200's memory, 144 and 141 GB: the lower
H100 = "glennklockwood.com/garden/processors/h100; awesomeagents.ai/hardware/nvidia-h100; one 400 Gb/s port a GPU assumed"
H200 = "glennklockwood.com/garden/processors/h100; saulelectric.com/nvidia-h200.html; one 400 Gb/s port a GPU assumed"
# between pods, a chip: v5e 6.4 Tb/s a pod of 256, which is also 2 x 100 Gb/s a host of 8; v6e 25.6 Tb/s a pod of 256, also
# 4 x 200 Gb/s a host of 8; v5p 50 Gb/s. ICI two-way: 400, 1200 and 800 GB/s a chip (one edition gives v6e 896)
GOOGLE = "docs.cloud.google.com/tpu/docs/{0}; cloud.google.com/tpu/docs/{0} (editions of one vendor's page)"
CHIPS = (
    Chip("H100 SXM", 989.4e12, 494.7e12, 80e9, 450e9, 8, 50e9, H100, ("NVIDIA H100 80GB HBM3",)),
    Chip("H200 SXM", 989.4e12, 494.7e12, 141e9, 450e9, 8, 50e9, H200, ("NVIDIA H200",)),
    Chip(
        "TPU v5e",
        197e12,
        197e12,
        16 * 2**30,
        200e9,
        256,
        3.1e9,
        GOOGLE.format("v5e"),
        ("TPU v5 lite", "TPU v5e"),
    ),
    Chip(
        "TPU v5p",
        459e12,
        459e12,
        95 * 2**30,
        600e9,
        8960,
        6.2e9,
        "docs.cloud.google.com/tpu/docs/v5p-training, two editions, DCN in one",
        ("TPU v5", "TPU v5p"),
    ),
    Chip(
        "TPU v6e",
        918e12,
        918e12,
        32 * 2**30,
        400e9,
        256,
        12.5e9,
        GOOGLE.format("v6e"),
        ("TPU v6 lite", "TPU v6e"),
    ),
)


def peak_flops(kind: str, bfloat16: bool) -> float | None:
    """Peak dense FLOP/s of the chip that JAX calls ``kind``, or None if it is not in the table."""
    return next((chip.bf16 if bfloat16 else chip.float32 for chip in CHIPS if kind in chip.kinds), None)


def communication_seconds(found: Sequence[Collective], chip: Chip) -> float:
    """Seconds of bandwidth-bound ring collectives, one after the other.

    A ring over n devices moves (n-1)/n of a gathered, scattered or exchanged array through each link, an all-reduce
    twice that. Latency is left out: it matters below about 1 MB.
    """
    total = 0.0
    for c in found:
        n = max(c.group, 1)
        speed = chip.link if n <= chip.domain else chip.outer
        # bytes are of the result: a reduce-scatter's input is n times as large
        moved = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1.0}.get(
            c.kind, (n - 1) / n
        )
        total += c.times * moved * c.bytes / speed
    return total
