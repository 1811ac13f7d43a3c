"""`jaxdiff plan`: what a training would take on a mesh that is not there, from shapes alone.

The parent starts a child process on the CPU platform with as many simulated devices as the mesh has (up to
``MOST``; XLA reads the number once, before jax is imported). The child counts (``plan_count``) and prints (``plan_report``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

from ml_collections import ConfigDict

from jaxdiff import config as config_lib
from jaxdiff.commands.plan_count import Plan, make_plan
from jaxdiff.commands.plan_report import report
from jaxdiff.config import ConfigError

__all__ = ["MOST", "Plan", "make_plan", "parse_mesh", "report", "run"]

MOST = 512  # simulated devices


def parse_mesh(text: str | None, config: ConfigDict) -> tuple[int, int, int]:
    """``"8x16x1"`` as (data, fsdp, tensor); without text the config's own mesh, which must then be explicit."""
    if text is None:
        sizes = [config.mesh.data, config.mesh.fsdp, config.mesh.tensor]
        if -1 in sizes:
            raise ConfigError(f"mesh: config.mesh is {'x'.join(map(str, sizes))}; give --mesh DATAxFSDPxTENSOR")
    else:
        words = text.split("x")
        if len(words) != 3 or not all(word.isdigit() for word in words):
            raise ConfigError(f"mesh: {text!r} given; need DATAxFSDPxTENSOR, such as 8x16x1")
        sizes = [int(word) for word in words]
    if min(sizes) < 1:
        raise ConfigError(f"mesh: {'x'.join(map(str, sizes))} given; sizes are at least 1")
    data, fsdp, tensor = sizes
    if fsdp * tensor > MOST:
        raise ConfigError(f"mesh: fsdp x tensor = {fsdp * tensor}; at most {MOST} devices are simulated")
    return data, fsdp, tensor


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """``"32x32x4"`` as a tuple."""
    if text is None:
        return None
    words = text.split("x")
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise ConfigError(f"shape: {text!r} given; need sizes such as 32x32x4")
    return tuple(map(int, words))


def run(
    config: ConfigDict,
    mesh: str | None,
    *,
    shape: str | None = None,
    classes: int = 0,
    mfu: float = 0.4,
    compiled: bool = True,
) -> int:
    """Print the plan, counted in a child process with simulated devices; returns its exit status."""
    data, fsdp, tensor = parse_mesh(mesh, config)
    example = parse_shape(shape)
    if not 0 < mfu <= 1:
        raise ConfigError(f"mfu: {mfu} given; need a share in (0, 1]")
    if classes < 0:
        raise ConfigError(f"classes: {classes} given; need at least 0")
    if config.mesh.slices < 1 or data % config.mesh.slices:
        raise ConfigError(f"config.mesh.slices: {config.mesh.slices} given; need a number that divides data={data}")
    shards = data * fsdp
    if config.data.batch_size % (shards * config.train.accumulate):
        raise ConfigError(
            f"config.data.batch_size: {config.data.batch_size} is not divisible by {shards * config.train.accumulate} "
            f"(data x fsdp = {shards} devices, accumulate = {config.train.accumulate})"
        )
    # two replicas at least: one has nobody to sum its gradients with
    simulated = max(min(data, 2), min(data, MOST // (fsdp * tensor))) * fsdp * tensor
    kept = [f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
    flags = " ".join([*kept, f"--xla_force_host_platform_device_count={simulated}"])
    request = {
        "config": config.to_dict(),
        "mesh": [data, fsdp, tensor],
        "shape": example,
        "classes": classes,
        "mfu": mfu,
        "compiled": compiled,
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(request, file)
        file.flush()
        return subprocess.run(
            [sys.executable, "-m", "jaxdiff.commands.plan", file.name],
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        ).returncode


def _child(path: str) -> int:
    with open(path) as file:
        request = json.load(file)
    config = config_lib.default()
    for section, value in request["config"].items():
        if isinstance(value, dict):
            for name, item in value.items():
                config[section][name] = item
        else:
            config[section] = value
    try:
        made = make_plan(
            config,
            tuple(request["mesh"]),
            shape=request["shape"] and tuple(request["shape"]),
            classes=request["classes"],
            compiled=request["compiled"],
        )
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"jaxdiff plan: {error}", file=sys.stderr)
        return 2
    print(report(made, request["mfu"]))
    return 0


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1]))
