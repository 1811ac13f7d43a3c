"""Two real processes write a checkpoint together and walk back together; one process reads what they wrote."""

import pathlib
import subprocess
import sys
import textwrap

import job
import numpy as np

from jaxdiff.train.checkpoint import Checkpointer

WORKER = """
    import os, sys
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    port, process, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process, heartbeat_timeout_seconds=300)
    from jaxdiff.train.checkpoint import Checkpointer, CheckpointError
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def put(x, *spec):
        sharding = NamedSharding(mesh, P(*spec))
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    def state(step):
        values = np.arange(96, dtype=np.float32).reshape(8, 12) + step
        key = jax.jit(lambda: jax.random.key(step), out_shardings=NamedSharding(mesh, P()))()
        return {"w": put(values, "data"), "cols": put(values, None, "data"), "b": put(values[0]), "n": np.arange(3),
                "key": key, "ema": {"w": put(-values, "data")}}

    def same(a, b):
        shards = lambda x: [np.asarray(s.data).tobytes() for s in jax.random.key_data(x).addressable_shards] if (
            jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)) else (
            [np.asarray(s.data).tobytes() for s in x.addressable_shards] if isinstance(x, jax.Array) else x.tobytes())
        return all(shards(x) == shards(y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))

    saver = Checkpointer(directory, keep_last=2)
    for step in (1, 2, 3):
        saver.save(step, state(step), meta={"step": step})
    saver.wait()
    jax.experimental.multihost_utils.sync_global_devices("saved")
    assert saver.steps() == [2, 3], saver.steps()
    found = saver.restore_latest(state(0))
    assert found.step == 3 and same(found.state, state(3)) and not found.bad
    jax.experimental.multihost_utils.sync_global_devices("read")
    if process == 0:  # one bit of the digests that process 1 wrote
        path = os.path.join(directory, "3", "meta", "digests-1.json")
        text = bytearray(open(path, "rb").read())
        text[len(text) // 2] ^= 1
        open(path, "wb").write(text)
    jax.experimental.multihost_utils.sync_global_devices("flipped")
    found = saver.restore_latest(state(0))
    assert found.step == 2 and same(found.state, state(2)) and found.bad[0].renamed == "3.corrupt"
    try:
        saver.save(4, {"w": jax.numpy.ones(3)}, meta={})
    except ValueError as error:
        assert "w is an array of one process" in str(error)
    saver.close()
    print("done", process, flush=True)
    jax.distributed.shutdown()
"""


def test_two_processes(tmp_path):
    port = job.free_port()
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    workers = [
        subprocess.Popen(
            [sys.executable, script, str(port), str(process), tmp_path / "c"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=pathlib.Path(__file__).parents[2],
            start_new_session=True,
        )
        for process in range(2)
    ]
    outputs = [output for _, output in job.finish(workers)]
    assert all(f"done {process}" in output for process, output in enumerate(outputs)), "\n".join(outputs)[-6000:]

    values = np.arange(96, dtype=np.float32).reshape(8, 12) + 2
    with Checkpointer(tmp_path / "c", read_only=True) as reader:  # now one process, eight devices
        assert reader.steps() == [2] and reader.verify(2) is None
        assert np.array_equal(reader.restore_ema().state["w"], -values)
