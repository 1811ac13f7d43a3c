r"""`jaxdiff export`: a trained run as a folder that samples without jaxdiff.

The folder holds three files:

- ``sampler.jax``: the sampler by ``jax.export``, for cpu, cuda and tpu, any batch size;
- ``weights.safetensors``: every array it reads, by name (``params/...`` are the network's, the rest is the solver's table,
  the guidance scale and the process);
- ``card.json``: config, solver, shapes, versions and the digests of both files.

Reading it takes jax, safetensors and flatbuffers (``LOADER``, also in the card). The exported function is
``(weights, key, index[, label]) -> x0`` with ``index`` the (B,) uint32 global sample indices: sample i depends on the key
and i alone, so a large set may be drawn in parts of any size. It runs the same program as ``jaxdiff sample``; in float32,
at equal device and jax version, its samples have the same bits.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

import jaxdiff
from jaxdiff import prediction
from jaxdiff.commands import assemble, draw
from jaxdiff.config import ConfigError
from jaxdiff.eval.whole_file import write_whole
from jaxdiff.solver.sampling import programs
from jaxdiff.solver.table import Table, device

__all__ = ["LOADER", "PLATFORMS", "export_sampler", "run"]

PLATFORMS = ("cpu", "cuda", "tpu")
FILES = ("sampler.jax", "weights.safetensors", "card.json")

# ten lines, of which nothing is jaxdiff's
LOADER = '''\
import jax, jax.export, numpy as np
from safetensors.flax import load_file

def load(folder):
    """sample(seed, index, label=None) of an exported sampler; index (B,) are global sample indices."""
    with open(f"{folder}/sampler.jax", "rb") as file:
        call = jax.jit(jax.export.deserialize(bytearray(file.read())).call)
    weights = load_file(f"{folder}/weights.safetensors")
    more = lambda label: () if label is None else (np.asarray(label, np.int32),)
    return lambda seed, index, label=None: call(weights, jax.random.key(seed), np.asarray(index, np.uint32), *more(label))
'''


def _need(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError:
        raise ModuleNotFoundError(
            f"export needs {module}; install jaxdiff[export] (and safetensors, where it is missing)"
        ) from None


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_arrays(table: Table, d: Any, params: Any) -> tuple[dict[str, Any], Any]:
    """``(name -> array, rebuild)``: every array of a table and a denoiser; ``rebuild(arrays)`` is the pair again.

    Network parameters are called ``params/<path>``, whatever stands around the denoiser; other leaves by their place.
    """
    weights = {id(leaf): f"params/{_name(path)}" for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    leaves, structure = jax.tree_util.tree_flatten_with_path({"table": table, "denoiser": d})
    # guided denoisers hold the network's parameters more than once: one name, one array
    names = [weights.get(id(leaf)) or _name(path) for path, leaf in leaves]
    arrays = {name: jnp.asarray(leaf) for name, (_, leaf) in zip(names, leaves)}

    def rebuild(given: dict[str, Any]) -> tuple[Table, Any]:
        both = jax.tree_util.tree_unflatten(structure, [given[name] for name in names])
        return both["table"], both["denoiser"]

    return arrays, rebuild


def export_sampler(
    table: Table, d: Any, params: Any, shape: tuple[int, ...], *, labels: bool
) -> tuple[jax.export.Exported, dict[str, Any]]:
    """``(exported, arrays)`` of :func:`jaxdiff.solver.sample` for samples of ``shape`` (without the batch).

    Args:
        table: the solver.
        d: the denoiser, guided or not, before it is told labels.
        params: the network's parameters inside ``d``, for their names.
        shape: of one sample.
        labels: whether the exported function takes (B,) int32 labels.

    Returns:
        ``exported.call(arrays, key, index[, label])``, symbolic in B.
    """
    arrays, rebuild = named_arrays(device(table), prediction.lift(d), params)

    def sampler(given: dict[str, Any], key: jax.Array, index: jax.Array, *label: jax.Array) -> jax.Array:
        table, d = rebuild(given)
        if label:
            d = prediction.condition(d, label[0])
        begin, go = programs((index.shape[0], *shape), None, (), "float32")
        x, index = begin(table, key, index, None)
        return go(table, d, x, key, index, None)

    (batch,) = jax.export.symbolic_shape("b")
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
    inputs = [abstract, jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((batch,), jnp.uint32)]
    if labels:
        inputs.append(jax.ShapeDtypeStruct((batch,), jnp.int32))
    return jax.export.export(jax.jit(sampler), platforms=PLATFORMS)(*inputs), arrays


def _put(path: epath.Path, data: bytes) -> str:
    """Write whole or not at all; returns the SHA-256."""
    write_whole(path, data)
    return hashlib.sha256(data).hexdigest()


def run(path: str, out: str, overrides: dict[str, str]) -> epath.Path:
    """`jaxdiff export`: write the folder ``out`` for the run in ``path``; returns ``out``.

    Raises:
        ModuleNotFoundError: without flatbuffers or safetensors, before anything is read.
        ConfigError: if there is no run, or ``out`` is a file or a folder of something else.
    """
    _need("flatbuffers")
    _need("safetensors")
    from safetensors.flax import save

    folder = epath.Path(out)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out: {out!r} is a file; give a folder")
    if folder.exists() and any(p.name.removesuffix(".partial") not in FILES for p in folder.iterdir()):
        raise ConfigError(f"out: {out!r} is not empty and holds no earlier export; give a new folder")
    made, params, source = draw.load_run(path, overrides)
    draw.check_writable(folder / FILES[0], "out")
    config = made.config
    params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), params)  # on one device, whatever the run's mesh was
    table = assemble.table(made)
    d = assemble.shaped(made, assemble.denoiser(made, params), config.guidance.name, config.guidance.scale)
    exported, arrays = export_sampler(table, d, params, made.shape, labels=bool(made.num_classes))
    folder.mkdir(parents=True, exist_ok=True)
    digests = {
        FILES[0]: _put(folder / FILES[0], bytes(exported.serialize())),
        FILES[1]: _put(folder / FILES[1], save(arrays)),
    }
    card = {
        "format": 1,
        "files_sha256": digests,
        "inputs": ["weights", "key", "index (B,) uint32"] + ["label (B,) int32"] * bool(made.num_classes),
        "output": {"shape": ["B", *made.shape], "dtype": "float32", "levels": source.levels},
        "num_classes": made.num_classes,
        "null_label": made.null_label if made.num_classes else None,
        "parameters": {
            "digest": draw.fingerprint(params),
            "count": sum(math.prod(x.shape) for x in jax.tree.leaves(params)),
            "averaged": bool(config.ema.decay),
        },
        "solver": {
            "name": config.solver.name,
            "rows": table.rows,
            # classifier-free guidance asks the network twice a row, in one batch
            "nfe": int(np.sum(table.live)) * (2 if config.guidance.name != "none" else 1),
            "tau": np.asarray(table.tau, np.float64).tolist(),
        },
        "platforms": list(PLATFORMS),
        "calling_convention": exported.calling_convention_version,
        "versions": {
            "jaxdiff": jaxdiff.__version__,
            **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy", "safetensors")},
        },
        "config": config.to_dict(),
        "loader": LOADER,
    }
    _put(folder / FILES[2], (json.dumps(card, indent=1, sort_keys=True) + "\n").encode())
    return folder
