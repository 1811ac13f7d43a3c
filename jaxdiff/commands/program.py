"""The compiled step kept on disk, so that a run that starts again neither traces nor compiles it.

The compile cache spares a restart the compiler's work, but not Python's: tracing and lowering a network and its
gradient can take longer than all imports and the restore together. So the executable itself is kept, with the
structure of the state it takes. It answers one exact question, which is written beside it as a digest (``identity``);
any other question, and any file that is not what was written, is answered by compiling as ever.

Loading it is linking, which needs neither Python nor what the step was made from: ``preload`` begins with it in the
background as soon as jax is there, while everything else is imported and the checkpoint is read and verified.

What is loaded is code, and it is read with pickle: a working directory deserves the trust that a program deserves.
This module imports jax and nothing of jaxdiff but its name: it is there before the rest.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import os
import pathlib
import pickle
import platform
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
from etils import epath
from jax.experimental import serialize_executable
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxdiff

if TYPE_CHECKING:
    from jaxdiff.train.state import TrainState
    from jaxdiff.train.step import Step

__all__ = ["FILE", "Program", "identity", "preload"]

FILE = "step.program"  # in the working directory
_log = logging.getLogger(__name__)
_CACHE_HIT = "/jax/compilation_cache/cache_hits"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
_UNRELATED = ("cache", "log", "distributed", "traceback", "debug", "dump", "transfer_guard")  # of jax's settings
_JOB = ("JAX_COORDINATOR_ADDRESS", "SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES", "JAXDIFF_DISTRIBUTED")
_begun: dict[str, tuple[dict[str, Any], concurrent.futures.Future] | None] = {}


@dataclasses.dataclass(frozen=True)
class _Spec:
    """Shape, dtype and partition of one leaf of the state, as they can be pickled."""

    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec


# ------------------------------------------------------------------------------------------- what it depends on


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _machine() -> str:
    """Digest of what a loaded executable needs: versions, jax's settings, the compiler's environment, the processor."""
    settings = {k: repr(v) for k, v in jax.config.values.items() if not any(word in k for word in _UNRELATED)}
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    told = {k: v for k, v in os.environ.items() if k in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    return _digest([settings, versions, platform.python_version(), told, platform.machine(), _processor()])


def _processor() -> list[str]:
    """The processor's instruction set: a CPU program may use all of it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.processor()]
    return sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})


def identity(mesh: Mesh, facts: Mapping[str, Any]) -> str:
    """Digest of everything that the compiled step is a function of.

    Args:
        mesh: where it runs: axes, and the devices' kinds and numbers.
        facts: JSON of what the caller builds it from (config, shapes of the data).

    Returns:
        64 hex digits over the facts, the mesh, jaxdiff's own source, the versions of jax, its kin and its runtime, jax's
        settings, the compiler's environment and the processor.
    """
    root = pathlib.Path(jaxdiff.__file__).parent
    source = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        source.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    devices = [[d.platform, d.device_kind, d.id] for d in mesh.devices.flat]
    runtime = mesh.devices.flat[0].client.platform_version  # CUDA's, libtpu's
    return _digest([facts, source.hexdigest(), _machine(), list(mesh.shape.items()), devices, runtime])


# -------------------------------------------------------------------------------------------------- the file


def _read(path: epath.Path) -> dict[str, Any] | None:
    """The file's content, or None if it is not whole."""
    envelope = path.read_bytes()
    head, body = envelope[:64], envelope[64:]
    return pickle.loads(body) if hashlib.sha256(body).hexdigest().encode() == head else None


def _link(content: dict[str, Any]) -> Callable:
    known = {device.id: device for device in jax.devices()}
    devices = [known[number] for number in content["devices"]]
    packed, inputs, outputs = content["executable"]
    return serialize_executable.deserialize_and_load(packed, inputs, outputs, execution_devices=devices)


def _begin(path: epath.Path) -> tuple[dict[str, Any], concurrent.futures.Future] | None:
    """Read a program and begin to link it in the background; None if there is none, it is torn, or made elsewhere."""
    try:
        content = _read(path) if path.exists() else None
        if content is None or content["machine"] != _machine():
            return None
    except Exception as error:  # it can always be compiled again
        _not_loaded(path, error)
        return None
    worker = concurrent.futures.ThreadPoolExecutor(1, "program")
    future = worker.submit(_link, content)
    worker.shutdown(wait=False)
    return content, future


def _not_loaded(path: epath.Path, error: Exception) -> None:
    _log.warning("%s could not be loaded, the step is compiled: %s: %s", path, type(error).__name__, error)


def preload(workdir: str | os.PathLike) -> None:
    """Begin to load the program of a working directory; ``Program`` will find it.

    Touches the devices, so a process that may be one of several (``train/distributed.py``) leaves it. Costs nothing
    where there is no program.
    """
    path = epath.Path(workdir) / FILE
    if not any(os.environ.get(name) for name in _JOB):
        _begun[os.fspath(path)] = _begin(path)


class Program:
    """Where the step of one run is kept, and the ``identity`` it must have. One process only; others compile."""

    def __init__(self, path: epath.Path, identity: str):
        self.path, self.identity = path, identity
        self._linking: concurrent.futures.Future | None = None
        self._key: tuple[str, Any] | None = None

    def target(self, mesh: Mesh) -> TrainState | None:
        """The abstract state, laid over ``mesh``, that the kept program takes; None if none answers this identity."""
        begun = _begun.pop(os.fspath(self.path), None)
        if jax.process_count() > 1:
            return None
        begun = begun or _begin(self.path)
        if begun is None or begun[0]["identity"] != self.identity:
            return None
        try:
            structure = pickle.loads(begun[0]["structure"])
            self._key = begun[0]["key"]
        except Exception as error:
            _not_loaded(self.path, error)
            return None
        self._linking = begun[1]
        place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, leaf.spec))
        return jax.tree.map(place, structure, is_leaf=lambda node: isinstance(node, _Spec))

    def key(self, mesh: Mesh) -> jax.Array:
        """The key that the kept program was given, whole on every device; to be asked after ``target`` has answered.

        It is a function of the seed, which the identity's facts hold; making it anew would compile four small programs.
        """
        if self._key is None:
            raise RuntimeError(f"{self.path}: no kept program has answered, so there is no key of it")
        implementation, data = self._key
        return jax.device_put(
            jax.random.wrap_key_data(data, impl=implementation), NamedSharding(mesh, PartitionSpec())
        )

    def ready(self, step: Step, target: TrainState, batch: Any, key: jax.Array) -> Callable:
        """What to call as ``step(state, batch, key)``: the kept program, or the step compiled now, and kept.

        What XLA's compile cache gave cannot be kept (its code does not survive a second writing): then nothing is.
        """
        if jax.process_count() > 1 or step.fixed != (None, None):
            return step
        if self._linking is not None:
            try:
                return _on_trees(self._linking.result(), target)
            except Exception as error:
                _not_loaded(self.path, error)
        outline = jax.tree.structure(target)

        def flat(leaves: list, batch: Any, key: jax.Array) -> tuple[list, Any]:
            # lists and dictionaries alone: linking then needs no class of ours, nor of optax
            state, metrics = step.jitted(jax.tree.unflatten(outline, leaves), batch, key, step.fixed)
            return jax.tree.leaves(state), metrics

        hits: list[str] = []
        note = lambda event, **_: hits.append(event) if event == _CACHE_HIT else None
        jax.monitoring.register_event_listener(note)
        try:
            compiled = jax.jit(flat, donate_argnums=0).lower(jax.tree.leaves(target), batch, key).compile()
        finally:
            jax.monitoring.unregister_event_listener(note)
        if not hits:
            self._keep(compiled, target, key)
        return _on_trees(compiled, target)

    def _keep(self, compiled: Any, target: TrainState, key: jax.Array) -> None:
        try:
            structure = jax.tree.map(lambda x: _Spec(x.shape, str(x.dtype), x.sharding.spec), target)
            mesh = jax.tree.leaves(target)[0].sharding.mesh
            content = {
                "identity": self.identity,
                "machine": _machine(),
                "devices": [device.id for device in mesh.devices.flat],
                "executable": serialize_executable.serialize(compiled),
                "structure": pickle.dumps(structure),
                "key": (str(jax.random.key_impl(key)), jax.device_get(jax.random.key_data(key))),
            }
            body = pickle.dumps(content)
            part = self.path.parent / f"{self.path.name}.part"
            part.write_bytes(hashlib.sha256(body).hexdigest().encode() + body)
            part.replace(self.path)
        except Exception as error:  # a restart is slower, nothing else
            _log.warning("%s was not written: %s: %s", self.path, type(error).__name__, error)


def _on_trees(call: Callable, target: TrainState) -> Callable:
    """``step(state, batch, key)`` from the program on lists of leaves."""
    outline = jax.tree.structure(target)

    def step(state: TrainState, batch: Any, key: jax.Array) -> tuple[TrainState, Any]:
        leaves, metrics = call(jax.tree.leaves(state), batch, key)
        return jax.tree.unflatten(outline, leaves), metrics

    return step
