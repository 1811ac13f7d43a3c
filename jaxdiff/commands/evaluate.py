"""`jaxdiff eval`: how good a trained run's samples are, each number beside what real data reach."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from etils import epath

from jaxdiff.commands import assemble, draw
from jaxdiff.config import ConfigError
from jaxdiff.data import Dataset
from jaxdiff.eval import class_agreement, default_network, image_grid, report, report_table
from jaxdiff.eval.report import quotas
from jaxdiff.eval.whole_file import write_whole

__all__ = ["run"]

LEAST = 5  # points that every distance needs


def run(path: str, overrides: dict[str, str]) -> dict[str, Any]:
    """Draw samples without and with guidance, compare with held-out data, write metrics.json and samples.png.

    Distances are of unguided samples with the held-out labels' proportions; class agreement is that of guided
    samples. Samples of data with levels are rounded to those levels first.
    """
    made, params, source = draw.load_run(path, overrides)
    config, workdir = made.config, epath.Path(path)
    draw.check_writable(workdir / "metrics.json", "workdir")
    assemble.check_guidance(made, config.guidance.name)
    heldout = _heldout(made, source)
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
    if made.num_classes and draw.is_image(made.shape):
        guided = _guided(made, plain, source, workdir / "samples.png")
        if guided is not None:
            guided["difference"] = guided["class_agreement"] - result["class_agreement"]["heldout"]
            result["guided"] = guided
    result["solver"] = {
        "name": config.solver.name,
        "steps": config.solver.steps,
        "nfe": int(assemble.table(made).nfe),
    }
    write_whole(workdir / "metrics.json", (json.dumps(result, indent=1) + "\n").encode())
    print(report_table(result))
    if "guided" in result:
        g, own = result["guided"], result["class_agreement"]["heldout"]
        print(
            f"class agreement with {g['guidance']} at scale {g['scale']:g}: {g['class_agreement']:.4f} "
            f"({g['count']} samples); the classifier's own held-out accuracy: {own:.4f} ({g['difference']:+.4f})"
        )
    return result


def _heldout(made: assemble.Setup, source: Dataset) -> Dataset:
    """The split to compare with; refused, before anything is drawn, where the training set cannot be compared with it."""
    data = made.config.data
    refuse = lambda why: ConfigError(f"config.data.heldout: {data.heldout!r} given; {why}")
    if data.heldout == data.split:
        raise refuse("it is the split trained on, which tells nothing of copies; need another one")
    try:
        heldout = assemble.dataset(made.config, data.heldout)
    except ValueError as error:
        raise refuse(str(error)) from error
    if heldout.shape != source.shape:
        raise refuse(f"its examples have shape {heldout.shape}, those trained on {source.shape}")
    if len(heldout) < LEAST:
        raise refuse(f"it has {len(heldout)} examples; need at least {LEAST}")
    if made.num_classes and not 1 <= (heldout.num_classes or 0) <= made.num_classes:
        given = f"labels of {heldout.num_classes} classes" if heldout.num_classes else "no labels"
        raise refuse(f"it has {given}, the network knows {made.num_classes}")
    return heldout


def _guided(made: assemble.Setup, plain: Any, source: Any, picture: epath.Path) -> dict[str, Any] | None:
    """Draw labelled images with guidance and picture ten of each class (as many as there are, of at most 100 classes); the
    share that a classifier gives its label, or None where there is no classifier."""
    config = made.config
    name = "cfg" if config.guidance.name == "none" else config.guidance.name
    scale = config.eval.guidance_scale
    each = np.arange(min(config.eval.num, 1000), dtype=np.int32) % made.num_classes
    d = assemble.shaped(made, plain, name, scale)
    strong = draw.quantise(
        draw.many(made, d, len(each), seed=config.sample.seed + 2, cond=each, title=name), source.levels
    )
    columns = max(1, min(10, len(each) // made.num_classes))
    shown = [np.flatnonzero(each == c)[:columns] for c in range(min(made.num_classes, len(each), 100))]
    image_grid(strong[np.concatenate(shown)], len(shown), columns, picture)
    network = default_network(made.shape)
    if network.name == "pixels":
        return None
    agreement = class_agreement(network, strong, each)
    return {"guidance": name, "scale": scale, "count": len(each), "class_agreement": agreement}
