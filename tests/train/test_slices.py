"""Meshes of several slices: only ``data`` crosses between them, and the numbers do not change."""

import dataclasses

import jax
import job
import numpy as np
import pytest
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
from tiny_training import host, init, largest_difference, player, run

from jaxdiff.train import create_state, make_mesh, make_step, state_shardings
from jaxdiff.train.mesh import AXES, arrange, together


@dataclasses.dataclass(frozen=True)
class Fake:
    """What the arrangement reads of a device."""

    id: int
    slice_index: int | None
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


def fakes(slices, each, shuffle=True):
    """Devices of some slices, in an order that mixes them."""
    made = [Fake(i, i // each) for i in range(slices * each)]
    return list(np.random.default_rng(0).permutation(np.array(made, object))) if shuffle else made


@pytest.mark.parametrize("sizes", [(4, 4, 2), (8, 1, 4), (2, 16, 1)])
def test_only_data_crosses_slices(sizes):
    laid = arrange(sizes, fakes(2, 16), 2)
    assert laid.shape == sizes and len({device.id for device in laid.flat}) == 32
    index = np.vectorize(lambda device: device.slice_index)(laid)
    assert (index == index[:, :1, :1]).all()  # fsdp and tensor stay inside
    assert (np.diff(index[:, 0, 0]) >= 0).all() and set(index.flat) == {0, 1}  # and data is whole inside each


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip of a TPU's torus, of which each host has a square of four."""

    id: int
    coords: tuple
    process_index: int
    core_on_chip: int = 0
    slice_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


@pytest.mark.parametrize("sizes", [(4, 1, 4), (2, 2, 4), (4, 2, 2), (16, 1, 1)])
def test_devices_along_tensor_are_of_one_process(sizes):
    """They see the same examples, and each process reads examples of its own."""
    chips = [Chip(4 * y + x, (x, y, 0), 2 * (y // 2) + x // 2) for y in range(4) for x in range(4)]
    laid = mesh_utils.create_device_mesh(sizes, chips, allow_split_physical_axes=True)
    process = lambda laid: np.vectorize(lambda chip: chip.process_index)(laid)
    apart = (process(laid) != process(laid)[..., :1]).any()
    assert apart == (sizes[2] == 4)  # a row of the torus is of two hosts
    kept = together(laid)
    assert (process(kept) == process(kept)[..., :1]).all() and {chip.id for chip in kept.flat} == set(range(16))
    assert apart or kept is laid


def test_processes_stand_in_for_slices():
    devices = [Fake(i, None, process_index=i // 4) for i in range(8)]
    laid = arrange((4, 2, 1), devices, 2)
    assert np.vectorize(lambda device: device.process_index)(laid)[:, :, 0].tolist() == [
        [0, 0],
        [0, 0],
        [1, 1],
        [1, 1],
    ]


@pytest.mark.parametrize(
    ("sizes", "devices", "slices", "message"),
    [
        ((8, 4, 1), fakes(2, 16), 4, r"mesh.slices=4: the 32 devices lie in 2 slices"),
        ((2, 4, 1), [Fake(i, None) for i in range(8)], 2, r"mesh.slices=2: the 8 devices lie in 1 processes"),
        ((3, 1, 1), [Fake(i, i // 2) for i in range(3)], 2, r"unequal numbers of devices, \[2, 1\]"),
        ((1, 32, 1), fakes(2, 16), 2, r"mesh.data=1 is not divisible by mesh.slices=2"),
    ],
)
def test_slices_that_do_not_fit(sizes, devices, slices, message):
    with pytest.raises(ValueError, match=message):
        arrange(sizes, devices, slices)


def test_a_mesh_says_what_slices_it_needs():
    with pytest.raises(ValueError, match=r"mesh.slices=0: allowed are an integer >= 1, or -1"):
        make_mesh(slices=0)
    with pytest.raises(ValueError, match=r"mesh.slices=2: the 8 devices lie in 1 processes"):
        make_mesh(slices=2)
    with pytest.raises(ValueError, match=r"mesh.slices=1: the devices lie in 2 slices"):
        make_mesh(devices=fakes(2, 4))
    assert make_mesh(slices=-1) == make_mesh()


def test_training_on_slices_equals_training_on_one():
    """Real devices in the order that two interleaved slices give."""
    real = jax.devices()
    laid = arrange((4, 2, 1), [Fake(i, i % 2) for i in range(8)], 2)
    order = [device.id for device in laid.flat]
    assert order != list(range(8))
    hybrid = Mesh(np.array([real[i] for i in order], object).reshape(4, 2, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    entries, out = {"net": player()}, []
    for mesh in (make_mesh(data=4, fsdp=2), hybrid):
        state = create_state(entries, init, jax.random.key(0), mesh, (), 256)
        step = make_step(entries, mesh, state_shardings(state, mesh, (), 256))
        losses, state, _ = run(step, state, mesh, 10)
        out.append((losses, host(state.params)))
    assert np.abs(out[0][0] / out[1][0] - 1).max() < 1e-6
    assert largest_difference(out[1][1], out[0][1]) < 1e-5


@pytest.mark.slow
def test_two_processes_are_two_slices(tmp_path):
    """The command line, two processes of four devices each, against one process of eight."""
    config = tmp_path / "tiny.py"
    config.write_text(job.CONFIG)
    more = ["--config.mesh.fsdp=2", "--config.mesh.min_bytes=256", "--config.train.steps=50"]
    pair, alone = tmp_path / "pair", tmp_path / "alone"
    ends = job.finish(job.start_pair(config, pair, *more, "--config.mesh.slices=2", devices=4))
    assert [status for status, _ in ends] == [0, 0], ends
    ((status, output),) = job.finish([job.start(config, alone, *more, devices=8)])
    assert status == 0, output
    same_losses(pair, alone)


def same_losses(a, b):
    found, wanted = job.losses(a), job.losses(b)
    assert found.keys() == wanted.keys() and len(wanted) == 5
    assert all(abs(found[step] / wanted[step] - 1) < 1e-6 for step in wanted)


@pytest.mark.slow
def test_a_config_chooses_rules_and_explicit_fsdp(tmp_path):
    """The command line on 2 x 2 x 2 devices: the same losses as one device, and a table of what is split how."""
    config = tmp_path / "tiny.py"
    config.write_text(job.CONFIG)
    mesh = {"data": 2, "fsdp": 2, "tensor": 2, "min_bytes": 256, "fsdp_mode": "explicit"}
    more = [f"--config.mesh.{name}={value}" for name, value in mesh.items()]
    rules = '--config.mesh.rules=[["block_0_1", "replicated"], ["output/kernel", "tensor, *"]]'
    ((status, output),) = job.finish(
        [job.start(config, tmp_path / "split", *more, rules, "--config.train.steps=50", devices=8)]
    )
    assert status == 0, output
    ends = lambda path: {
        line.rsplit("  ", 1)[1]
        for line in output.splitlines()
        if line.lstrip().startswith(f"model/params/{path}/kernel")
    }
    assert ends("output") == {"('tensor',)"}  # the user's
    # the second matrix by the user's rule, before the network's own; the first by that, and automatic fsdp for the rest
    assert {"replicated", "('fsdp', 'tensor')"} <= ends("block_*_*")
    ((status, output),) = job.finish([job.start(config, tmp_path / "one", "--config.train.steps=50", devices=1)])
    assert status == 0, output
    same_losses(tmp_path / "split", tmp_path / "one")
