"""The device mesh ``data x fsdp x tensor`` and how a batch is laid over it.

Batches are split over ``data`` and ``fsdp`` together (fully-sharded data parallelism splits parameters
over devices that also split the batch); ``tensor`` splits parameters only.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, reshard

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def arrange(sizes: Sequence[int], devices: Sequence[Any], slices: int) -> np.ndarray:
    """Devices of a multi-slice job in the shape of the mesh: ``data`` alone crosses from slice to slice.

    Args:
        sizes: (data, fsdp, tensor), their product the number of devices.
        devices: the devices; slices are told apart by ``slice_index`` or, where that tells nothing, by process.
        slices: how many slices there are, at least 2.

    Raises:
        ValueError: if the devices lie in another number of slices, in unequal ones, or ``data`` does not divide.
    """
    index, unit = _slices(devices)
    counts = [index.count(one) for one in sorted(set(index))]
    if len(counts) != slices:
        raise ValueError(f"mesh.slices={slices}: the {len(devices)} devices lie in {len(counts)} {unit}")
    if len(set(counts)) > 1:
        raise ValueError(f"mesh.slices={slices}: the {unit} have unequal numbers of devices, {counts}")
    data, *fast = sizes
    if data % slices:
        raise ValueError(f"mesh.data={data} is not divisible by mesh.slices={slices}")
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, *fast),
        (slices, *(1 for _ in fast)),
        devices,
        process_is_granule=unit == "processes",
        allow_split_physical_axes=True,
    )


def together(laid: np.ndarray) -> np.ndarray:
    """Devices laid so that those along the last axis, ``tensor``, belong to one process: they see the same examples.

    An arrangement that follows a TPU's torus may cross hosts there; then devices are laid in order of slice and process.
    """
    process = np.vectorize(lambda device: device.process_index)(laid)
    if (process == process[..., :1]).all():
        return laid
    place = lambda device: (getattr(device, "slice_index", None) or 0, device.process_index, device.id)
    return np.array(sorted(laid.flat, key=place), object).reshape(laid.shape)


def _slices(devices: Sequence[Any]) -> tuple[list[int], str]:
    """The slice of each device, and what a slice is: processes stand in where devices report none, or only one."""
    reported: list[Any] = [getattr(device, "slice_index", None) for device in devices]
    if None in reported or len(set(reported)) == 1:
        return [device.process_index for device in devices], "processes"
    return reported, "slices"


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
    *,
    slices: int = 1,
    axis_type: AxisType = AxisType.Auto,
) -> Mesh:
    """Build the mesh with axes ``("data", "fsdp", "tensor")``.

    Args:
        data: devices along the data axis; at most one of the three sizes may be -1, "all the rest".
        fsdp: devices along which large parameters are split and gathered for use.
        tensor: devices along which matrix products are split.
        devices: the devices to use, all of them by default. A mesh smaller than the device count takes the
            first ones (single process only).
        slices: slices of a multi-slice job (or processes, where devices report one slice or none), joined by a slower network
            that only ``data`` crosses; -1 as many as devices report, 1 if they report none.
        axis_type: of all three axes; the train step and the samplers give the same numbers under ``Explicit``.

    Raises:
        ValueError: on a size that is not -1 or >= 1, on two -1, on a mesh larger than the devices, on a
            device count that the fixed sizes do not divide, or on slices that do not fit (see ``arrange``).
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or (size < 1 and size != -1):
            raise ValueError(f"mesh.{name}={size!r}: allowed are an integer >= 1, or -1 for all the rest")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"mesh: only one size may be -1, got -1 for {' and '.join(free)}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    shown = " x ".join(f"{name}={size}" for name, size in sizes.items())
    if fixed > len(devices):
        raise ValueError(f"mesh {shown} needs at least {fixed} devices, {len(devices)} are present")
    if free:
        if len(devices) % fixed:
            raise ValueError(f"mesh {shown}: {len(devices)} devices are not divisible by {fixed}")
        sizes[free[0]] = len(devices) // fixed
    count = math.prod(sizes.values())
    if count < len(devices) and jax.process_count() > 1:
        raise ValueError(
            f"mesh {shown} uses {count} of {len(devices)} devices: with several processes it must use all"
        )
    if jax.process_count() > 1 and jax.local_device_count() % sizes["tensor"]:
        # devices along tensor see the same examples, and each process reads examples of its own
        raise ValueError(
            f"mesh.tensor={sizes['tensor']}: must divide the {jax.local_device_count()} devices of one process"
        )
    devices, shape, types = devices[:count], tuple(sizes.values()), (axis_type,) * len(AXES)
    if isinstance(slices, bool) or not isinstance(slices, int | np.integer) or (slices < 1 and slices != -1):
        raise ValueError(f"mesh.slices={slices!r}: allowed are an integer >= 1, or -1 for as many as there are")
    index, unit = _slices(devices)
    if slices == 1 and unit == "slices" and len(set(index)) > 1:
        raise ValueError(f"mesh.slices=1: the devices lie in {len(set(index))} slices; allowed are that many, or -1")
    if slices == -1:
        slices = len(set(index)) if unit == "slices" else 1
    if slices > 1:
        laid = arrange(shape, devices, slices)
    else:  # a TPU's torus must be split where the mesh has another shape
        laid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(together(laid), AXES, axis_types=types)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """Place host values or arrays of this process, equal on all processes, whole on every device of the mesh."""
    if jax.process_count() == 1:
        return jax.device_put(tree, replicated(mesh))

    def put(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            # device_put reaches other processes' devices with plain numbers only
            data = jax.device_put(np.asarray(jax.random.key_data(x)), replicated(mesh))
            impl = jax.random.key_impl(x)
            return jax.jit(lambda d: jax.random.wrap_key_data(d, impl=impl), out_shardings=replicated(mesh))(data)
        return x if isinstance(x, jax.Array) and not x.is_fully_addressable else jax.device_put(x, replicated(mesh))

    return jax.tree.map(put, tree)


def is_explicit(mesh: Mesh) -> bool:
    """Whether shardings are part of array types on this mesh."""
    return AxisType.Explicit in mesh.axis_types


def lay(tree: Any, shardings: Any, mesh: Mesh) -> Any:
    """Inside jit: the tree with these shardings, as a constraint (Auto axes) or by resharding (Explicit axes)."""
    return (reshard if is_explicit(mesh) else jax.lax.with_sharding_constraint)(tree, shardings)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: the leading axis split over ``data`` and ``fsdp``."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Number of pieces a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch_size(size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Refuse a global batch size that the mesh times the accumulation count does not divide."""
    shards = batch_shards(mesh)
    if accumulate < 1:
        raise ValueError(f"accumulate={accumulate}: allowed are integers >= 1")
    if size % (shards * accumulate):
        raise ValueError(
            f"batch size {size} is not divisible by {shards * accumulate} "
            f"(data x fsdp = {shards} devices, accumulate = {accumulate})"
        )


def put_batch(batch: dict[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Place this process's part of a batch (numpy arrays, equal leading axes) on the mesh; asynchronous.

    Raises:
        ValueError: if leading axes differ, do not divide by the mesh, or "index" does not fit in 32 bits.
    """
    leaves = jax.tree.leaves(batch)
    lengths = {np.shape(leaf)[0] if np.ndim(leaf) else None for leaf in leaves}
    if len(lengths) != 1 or None in lengths:
        shapes = {name: np.shape(value) for name, value in batch.items()}
        raise ValueError(f"batch: every array needs the same leading axis, got shapes {shapes}")
    check_batch_size(lengths.pop() * jax.process_count(), mesh)
    index = batch.get("index")
    if isinstance(index, np.ndarray) and index.size and int(index.max()) > np.iinfo(np.uint32).max:
        raise ValueError(f"batch['index'] reaches {index.max()}, above 2^32 - 1; take it modulo 2^32")
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    with jax.transfer_guard_host_to_device("allow"):  # as explicit as device_put, but the guard does not know it
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)
