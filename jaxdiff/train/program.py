"""The compiled step kept on disk, so that a run that starts again neither traces nor compiles it.

The compile cache spares a restart the compiler's work, but not Python's: tracing and lowering a network and its
gradient can take longer than all imports and the restore together. So the executable itself is kept, with the
structure of the state it takes. It answers one exact question, which is written beside it as a digest (``identity``);
any other question, and any file that is not what was written, is answered by compiling as ever.

What is loaded is code, and it is read with pickle: a working directory deserves the trust that a program deserves.
"""

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import pickle
import platform
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath
from jax.experimental import serialize_executable
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxdiff
from jaxdiff.train.state import TrainState
from jaxdiff.train.step import Step

__all__ = ["Kept", "Program", "identity"]

_log = logging.getLogger(__name__)
_CACHE_HIT = "/jax/compilation_cache/cache_hits"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
_UNRELATED = ("cache", "log", "distributed", "traceback", "debug", "dump", "transfer_guard")  # of jax's settings


@dataclasses.dataclass(frozen=True)
class _Spec:
    """Shape, dtype and partition of one leaf of the state, as they can be pickled."""

    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec


@dataclasses.dataclass(frozen=True, eq=False)
class Kept:
    """A loaded program: ``step(state, batch, key)``, and the abstract state (with shardings) that it takes."""

    target: TrainState
    step: Callable


def identity(mesh: Mesh, facts: Mapping[str, Any]) -> str:
    """Digest of everything that the compiled step is a function of.

    Args:
        mesh: where it runs: axes, and the devices' kinds and numbers.
        facts: JSON of what the caller builds it from (config, shapes of the data).

    Returns:
        64 hex digits over the facts, jaxdiff's own source, the versions of ``jax`` and its kin, jax's settings, the
        compiler's environment and the processor.
    """
    import importlib.metadata

    root = pathlib.Path(jaxdiff.__file__).parent
    source = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        source.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    settings = {k: repr(v) for k, v in jax.config.values.items() if not any(word in k for word in _UNRELATED)}
    told = {k: v for k, v in os.environ.items() if k in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    everything = {
        "facts": facts,
        "source": source.hexdigest(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "settings": settings,
        "environment": told,
        "processor": [platform.machine(), _processor()],
        "mesh": [list(mesh.shape.items()), [[d.platform, d.device_kind, d.id] for d in mesh.devices.flat]],
    }  # fmt: skip
    return hashlib.sha256(json.dumps(everything, sort_keys=True, default=str).encode()).hexdigest()


def _processor() -> str:
    """The processor's instruction set: a CPU program may use all of it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


@dataclasses.dataclass(frozen=True)
class Program:
    """Where the step of one run is kept, and the ``identity`` it must have. One process only; others compile."""

    path: epath.Path
    identity: str

    def load(self, mesh: Mesh) -> Kept | None:
        """The kept program laid over ``mesh``, or None if there is none that answers this identity."""
        if jax.process_count() > 1 or not self.path.exists():
            return None
        try:
            envelope = self.path.read_bytes()
            head, body = envelope[:64].decode(), envelope[64:]
            if head != hashlib.sha256(self.identity.encode() + body).hexdigest():
                return None
            state, executable = pickle.loads(body)
            devices = list(mesh.devices.flat)
            call = serialize_executable.deserialize_and_load(*executable, execution_devices=devices)
        except Exception as error:  # it can always be compiled again
            _log.warning(
                "%s could not be loaded, the step is compiled: %s: %s", self.path, type(error).__name__, error
            )
            return None
        place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, leaf.spec))
        target = jax.tree.map(place, state, is_leaf=lambda node: isinstance(node, _Spec))
        return Kept(target, lambda state, batch, key: call(state, batch, key, (None, None)))

    def compile(self, step: Step, target: TrainState, batch: Any, key: jax.Array) -> Callable:
        """Compile the step for these arguments and keep it; returns what is called from now on.

        What XLA's compile cache gave cannot be kept (its code does not survive a second writing): then nothing is.
        """
        if jax.process_count() > 1 or step.fixed != (None, None):
            return step
        hits: list[str] = []
        note = lambda event, **_: hits.append(event) if event == _CACHE_HIT else None
        jax.monitoring.register_event_listener(note)
        try:
            compiled = step.lower(target, batch, key).compile()
        finally:
            jax.monitoring.unregister_event_listener(note)
        if not hits:
            self._keep(compiled, target)
        return lambda state, batch, key: compiled(state, batch, key, (None, None))

    def _keep(self, compiled: Any, target: TrainState) -> None:
        try:
            state = jax.tree.map(lambda x: _Spec(x.shape, str(x.dtype), x.sharding.spec), target)
            body = pickle.dumps((state, serialize_executable.serialize(compiled)))
            part = self.path.parent / f"{self.path.name}.part"
            part.write_bytes(hashlib.sha256(self.identity.encode() + body).hexdigest().encode() + body)
            part.replace(self.path)
        except Exception as error:  # a restart is slower, nothing else
            _log.warning("%s was not written: %s: %s", self.path, type(error).__name__, error)
