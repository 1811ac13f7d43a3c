"""Drawing samples from a trained run: parameters, labels, batches by global index, files that survive a kill."""

from __future__ import annotations

import hashlib
import json
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from jaxdiff import config as config_lib
from jaxdiff import solver
from jaxdiff.commands import assemble
from jaxdiff.config import ConfigError
from jaxdiff.data import from_levels, to_levels
from jaxdiff.eval import image_grid
from jaxdiff.solver.table import Table
from jaxdiff.train.checkpoint import Checkpointer
from jaxdiff.train.mesh import batch_sharding, batch_shards, make_mesh
from jaxdiff.train.metrics import replace_text
from jaxdiff.train.state import abstract_state

PICTURED = 100  # samples a picture shows

__all__ = ["averaged", "batch", "is_image", "labels", "load_run", "run", "show", "to_file"]


def averaged(state: Any) -> Any:
    """The parameters to sample with: the first moving average, or the parameters if there is none."""
    return state.ema["model"][0] if state.ema["model"] else state.params["model"]


def load_run(path: str, overrides: dict[str, str]) -> tuple[assemble.Setup, Any, Any]:
    """``(setup, params, training set)`` of a finished or running training, with dotted overrides applied.

    Overrides of what training fixed (process, network, target, ...) are refused: the parameters would be given another
    meaning than they were trained for.
    """
    workdir = epath.Path(path)
    stored = workdir / "config.json"
    if not stored.exists():
        raise ConfigError(f"workdir: {path} holds no config.json; train there first")
    config = config_lib.check(config_lib.apply_overrides(config_lib.restore(stored), overrides))
    for field in overrides:
        if field.partition(".")[0] not in config_lib.RELEVANT["eval"]:
            allowed = ", ".join(sorted(config_lib.RELEVANT["eval"]))
            raise ConfigError(f"config.{field}: fixed by the training of {path}; allowed here: fields of {allowed}")
        if field == "data.conditional":
            raise ConfigError(f"config.{field}: fixed by the training of {path}, whose network has labels or none")
    source = assemble.dataset(config, config.data.split)
    made = assemble.setup(config, source)
    if not (workdir / "checkpoints").exists():
        raise ConfigError(f"workdir: {path} holds no checkpoint yet")
    with Checkpointer(workdir / "checkpoints", read_only=True) as checkpointer:
        target = abstract_state(assemble.game(made), made.init, make_mesh())
        if config.ema.decay:
            return made, checkpointer.restore_ema(target=target.ema).state["model"][0], source
        found = checkpointer.restore_latest(target)
        if found is None:
            raise ConfigError(f"workdir: {checkpointer.directory} holds no checkpoint that verifies")
        return made, found.state.params["model"], source


def labels(made: assemble.Setup, count: int, start: int = 0, label: int | None = None) -> jax.Array | None:
    """Labels of the samples with global indices start..start+count-1: one label, or each class in turn."""
    all_labels = assemble.labels_for(made, start + count, label)
    return None if all_labels is None else jnp.asarray(all_labels[start:])


def batch(
    made: assemble.Setup,
    table: Table,
    d: Any,
    key: jax.Array,
    start: int,
    count: int,
    cond: Any = "turns",
    mesh: Mesh | None = None,
) -> jax.Array:
    """Samples start..start+count-1 of the run of ``key``, split over the mesh (all devices) where it divides ``count``.

    ``mesh``: the one that the parameters in ``d`` lie on, where that is not of all devices or in another order.
    """
    mesh = make_mesh() if mesh is None else mesh
    sharding = batch_sharding(mesh) if mesh.size > 1 and count % batch_shards(mesh) == 0 else None
    cond = labels(made, count, start) if isinstance(cond, str) else cond
    return solver.sample(table, d, key, (count, *made.shape), index=start, cond=cond, sharding=sharding)


def quantise(x: np.ndarray, levels: int | None) -> np.ndarray:
    """Samples moved to the data's levels (its bin centres); float data is left as it is."""
    return x if levels is None else from_levels(to_levels(x, levels), levels)


def many(made: assemble.Setup, d: Any, count: int, *, seed: int, cond: np.ndarray | None, title: str) -> np.ndarray:
    """``count`` samples in host memory, in batches of one shape, with a progress bar."""
    size = min(made.config.sample.batch_size, count)
    table, key, parts = assemble.table(made), jax.random.key(seed), []
    for start in tqdm(range(0, count, size), desc=title, unit="batch", disable=None):
        # the last batch is drawn whole and cut: another shape would compile again
        part = None if cond is None else jnp.asarray(np.resize(cond[start : start + size], size))
        parts.append(np.asarray(batch(made, table, d, key, start, size, part)))
    return np.concatenate(parts)[:count]


def run(path: str, overrides: dict[str, str], out: str | None, num: int | None, label: int | None) -> epath.Path:
    """`jaxdiff sample`: ``out`` .png draws a picture, .npz streams all samples (resumable) and draws one too."""
    target = epath.Path(out) if out else epath.Path(path) / "samples.png"
    if target.suffix not in (".png", ".npz"):
        raise ConfigError(f"out: {out!r} given; need a name ending in .png or .npz")
    if num is not None and not 1 <= num <= config_lib.MOST["sample.num"]:
        raise ConfigError(f"num: {num} given; need 1 to {config_lib.MOST['sample.num']}")
    made, params, source = load_run(path, overrides)
    config = made.config
    count = config.sample.num if num is None else num
    if target.suffix == ".png" and count > PICTURED:
        raise ConfigError(f"num: {count} given; a picture shows at most {PICTURED}, --out FILE.npz keeps all")
    check_writable(target, "out")
    d = assemble.shaped(made, assemble.denoiser(made, params), config.guidance.name, config.guidance.scale)
    wanted = assemble.labels_for(made, count, label)
    if target.suffix == ".npz":
        identity = {"config": config.to_dict(), "num": count, "label": label, "parameters": fingerprint(params)}
        to_file(made, d, count, wanted, target, identity, source.levels)
        picture = target.parent / (target.stem + ".png")
        first = head(target, min(count, PICTURED))
    else:
        picture = target
        if wanted is not None and label is None and made.num_classes == 10 and count == 100:
            wanted = np.repeat(np.arange(10, dtype=np.int32), 10)  # one class a row
        first = many(made, d, count, seed=config.sample.seed, cond=wanted, title="sample")
    show(first, picture)
    return target


def check_writable(target: epath.Path, field: str) -> None:
    """Refuse a file that cannot be written, making its folder: now, and not after hours of sampling."""
    folder = target.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise ConfigError(f"{field}: {target} is a folder; give a file name")
        probe = folder / f".{target.name}.writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{field}: cannot write to {folder} ({error.strerror or error})") from None


def is_image(shape: tuple[int, ...]) -> bool:
    """Whether an example of this shape is a grey or RGB image; latents, say, are not."""
    return len(shape) == 3 and shape[-1] in (1, 3)


def show(samples: np.ndarray, path: Any) -> None:
    """A picture of samples: images in rows of ten, the last filled up with black; of anything else two coordinates."""
    if not is_image(samples.shape[1:]):
        return scatter(samples, path)
    columns = min(10, len(samples))
    rows = -(-len(samples) // columns)
    black = np.full((rows * columns - len(samples), *samples.shape[1:]), -1.0, samples.dtype)
    image_grid(np.concatenate([samples, black]), rows, columns, path)


def scatter(points: np.ndarray, path: Any) -> None:
    """A picture of samples that are not images: their first two coordinates."""
    from jaxdiff.eval import picture

    figure = picture.new_figure(4, 4)
    axes = figure.add_subplot()
    flat = points.reshape(len(points), -1)
    axes.scatter(flat[:, 0], flat[:, min(1, flat.shape[1] - 1)], s=4)
    picture.save_figure(figure, path)


def fingerprint(params: Any) -> str:
    """A digest of the parameters' bytes."""
    digest = hashlib.sha256()
    for leaf in jax.tree_util.tree_leaves(params):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def to_file(
    made: assemble.Setup,
    d: Any,
    count: int,
    wanted: np.ndarray | None,
    target: epath.Path,
    identity: dict[str, Any],
    levels: int | None,
) -> None:
    """Stream ``count`` samples to an .npz of ``x0`` (float32) and ``label``, keeping finished chunks over a kill.

    Chunks lie in ``<target>.partial/`` under the identity of the run (config, count, parameters); a second call with
    the same identity draws only what is missing, and another identity is refused. Memory holds one chunk.
    """
    folder = target.parent / (target.name + ".partial")
    folder.mkdir(parents=True, exist_ok=True)
    card, size = folder / "identity.json", min(made.config.sample.batch_size, count)
    text = json.dumps({**identity, "chunk": size}, sort_keys=True)
    if card.exists() and card.read_text() != text:
        raise ConfigError(f"out: {folder} holds chunks of another run; delete it or give another --out")
    if not card.exists():
        replace_text(card, text)
    table, key = assemble.table(made), jax.random.key(made.config.sample.seed)
    starts = range(0, count, size)
    for start in tqdm(starts, desc="sample", unit="batch", disable=None):
        chunk = folder / f"{start:012d}.npy"
        if chunk.exists():
            continue
        part = None if wanted is None else jnp.asarray(np.resize(wanted[start : start + size], size))
        x = np.asarray(batch(made, table, d, key, start, size, part))[: count - start]
        unfinished = folder / f"{start:012d}.unfinished"
        with unfinished.open("wb") as file:
            np.save(file, x)
        unfinished.replace(chunk)
    temporary = target.parent / (target.name + ".writing")
    with temporary.open("wb") as raw, zipfile.ZipFile(raw, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("x0.npy", "w", force_zip64=True) as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (count, *made.shape)}
            np.lib.format.write_array_header_2_0(file, header)
            for start in starts:
                with (folder / f"{start:012d}.npy").open("rb") as chunk_file:
                    file.write(np.load(chunk_file).astype("<f4").tobytes())
        if wanted is not None:
            with archive.open("label.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(wanted, np.int32))
    temporary.replace(target)
    # what says whose chunks these are goes last: a kill in between must not leave chunks that any run would take
    for path in sorted(folder.iterdir(), key=lambda path: path.name == card.name):
        path.unlink()
    folder.rmdir()


def head(path: epath.Path, count: int) -> np.ndarray:
    """The first samples of an .npz that :func:`to_file` wrote; reads these alone."""
    with path.open("rb") as raw, zipfile.ZipFile(raw) as archive, archive.open("x0.npy") as file:
        np.lib.format.read_magic(file)
        (_, *shape), _, dtype = np.lib.format.read_array_header_2_0(file)
        return np.frombuffer(file.read(count * int(np.prod(shape)) * dtype.itemsize), dtype).reshape(count, *shape)
