"""`jaxdiff eval`: how good a trained run's samples are, each number beside what real data reach."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from etils import epath

from jaxdiff.commands import assemble, draw
from jaxdiff.eval import class_agreement, default_network, image_grid, report, report_table
from jaxdiff.eval.report import quotas

__all__ = ["run"]


def run(path: str, overrides: dict[str, str]) -> dict[str, Any]:
    """Draw samples without and with guidance, compare with held-out data, write metrics.json and samples.png.

    Distances are of unguided samples with the held-out labels' proportions; class agreement is that of guided
    samples. Samples of data with levels are rounded to those levels first.
    """
    made, params, source = draw.load_run(path, overrides)
    config, workdir = made.config, epath.Path(path)
    draw.check_writable(workdir / "metrics.json", "workdir")
    heldout = assemble.dataset(config, config.data.heldout)
    plain = assemble.denoiser(made, params)
    real, train = heldout.examples(), source.examples()
    count = config.eval.num
    wanted = None
    if made.num_classes:
        classes = quotas(real["label"], count)
        wanted = np.repeat(np.arange(len(classes), dtype=np.int32), classes)
    free = assemble.shaped(made, plain, "none", 1.0)
    samples = draw.quantise(
        draw.many(made, free, count, seed=config.sample.seed + 1, cond=wanted, title="unguided"), source.levels
    )
    result = report(
        samples,
        real["x0"],
        train["x0"],
        sample_labels=wanted,
        heldout_labels=real.get("label") if made.num_classes else None,
        train_labels=train.get("label") if made.num_classes else None,
        subsets=config.eval.subsets,
        seed=config.seed,
    )
    network = default_network(made.shape)
    if made.num_classes and len(made.shape) == 3:
        name = "cfg" if config.guidance.name == "none" else config.guidance.name
        scale = config.eval.guidance_scale
        each = np.arange(1000 if count >= 1000 else count, dtype=np.int32) % made.num_classes
        strong = draw.many(
            made,
            assemble.shaped(made, plain, name, scale),
            len(each),
            seed=config.sample.seed + 2,
            cond=each,
            title=name,
        )
        strong = draw.quantise(strong, source.levels)
        rows = [np.flatnonzero(each == c)[:10] for c in range(made.num_classes)]
        image_grid(strong[np.concatenate(rows)], made.num_classes, 10, workdir / "samples.png")
        if network.name != "pixels":
            agreement = class_agreement(network, strong, each)
            result["guided"] = {
                "guidance": name,
                "scale": scale,
                "count": len(each),
                "class_agreement": agreement,
                "difference": agreement - result["class_agreement"]["heldout"],
            }
    result["solver"] = {
        "name": config.solver.name,
        "steps": config.solver.steps,
        "nfe": int(assemble.table(made).nfe),
    }
    temporary = workdir / "metrics.json.partial"
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(workdir / "metrics.json")
    print(report_table(result))
    if "guided" in result:
        g, own = result["guided"], result["class_agreement"]["heldout"]
        print(
            f"class agreement with {g['guidance']} at scale {g['scale']:g}: {g['class_agreement']:.4f} "
            f"({g['count']} samples); the classifier's own held-out accuracy: {own:.4f} ({g['difference']:+.4f})"
        )
    return result
