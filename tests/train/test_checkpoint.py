"""Checkpoints: what goes in comes out, on any mesh; what does not fit is refused; what should stay, stays."""

import dataclasses
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.train.checkpoint import Checkpointer, CheckpointError, check_same_config

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from checkpoint_world import State, make_state, same, spread


def test_round_trip_of_every_kind_of_leaf(tmp_path):
    state = make_state(3)
    with Checkpointer(tmp_path / "c") as saver:
        assert saver.save(3, state, meta={"config": {"lr": 0.1}, "n": np.int64(4), "layers": {10: "a", 9: "b"}})
        assert saver.save(3, make_state(9), meta={}) is False  # one step is written once
    with Checkpointer(tmp_path / "c") as reader:
        found = reader.restore_latest(make_state(0))
        assert same(found.state, state) and found.step == 3 and found.bad == ()
        restored, meta = found  # the loop unpacks
        assert meta == {"config": {"lr": 0.1}, "n": 4, "layers": {"10": "a", "9": "b"}}
        assert restored.key.dtype == state.key.dtype and type(restored.opt[2]["rate"]) is float
        assert isinstance(restored.opt[2]["count"], np.int64) and isinstance(restored.opt[2]["flags"], np.ndarray)
        assert reader.latest_verified_step() == 3 and reader.meta(3) == meta
        names = {path.name for path in (tmp_path / "c" / "3").iterdir()}
        assert {"state", "ema", "meta"} <= names


def test_nothing_there(tmp_path):
    with Checkpointer(tmp_path / "c") as reader:
        assert reader.restore_latest(make_state()) is None
        assert reader.latest_verified_step() is None and reader.steps() == []
        with pytest.raises(CheckpointError, match="no intact checkpoint"):
            reader.restore_ema()
        with pytest.raises(CheckpointError, match=r"there is no checkpoint 7 .*there are: none"):
            reader.restore(7, make_state())


def test_folders_that_are_no_steps_are_left_alone(tmp_path):
    names = ("007", "99999999999999999999", "-5", "5.old", "foreign")
    with Checkpointer(tmp_path) as checkpointer:
        for name in names:
            (tmp_path / name).mkdir()
        assert checkpointer.steps() == []
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)


def test_ema_alone(tmp_path):
    state = make_state(1)
    with Checkpointer(tmp_path) as saver:
        saver.save(1, state, meta={"a": 1}, blocking=True)
    for path in sorted((tmp_path / "1" / "state").rglob("*"), reverse=True):  # sampling never reads the state item
        path.unlink() if path.is_file() else path.rmdir()
    with Checkpointer(tmp_path, read_only=True) as reader:
        typed, meta = reader.restore_ema(target=state.ema)
        assert same(typed, state.ema) and meta == {"a": 1}
        loose = reader.restore_ema(1).state
        assert np.array_equal(loose["model"]["1"]["odd.name/x"], state.ema["model"][1]["odd.name/x"])
        assert loose["model"]["0"]["half"].dtype == jnp.bfloat16 and loose["model"]["0"]["empty"].shape == (0, 3)
        assert reader.restore_latest(state) is None and len(reader.bad) == 1  # but the state is gone
        assert reader.bad[0].renamed is None and (tmp_path / "1").is_dir()  # read-only renames nothing


@pytest.mark.parametrize("saved_on", [1, 8])
def test_restore_on_other_device_counts(tmp_path, saved_on):
    state = make_state(5)
    with Checkpointer(tmp_path) as saver:
        saver.save(5, spread(state, saved_on), meta={})
        for count in (1, 2, 4, 8):
            target = spread(state, count, abstract=True)
            found = saver.restore(5, target)
            assert same(found.state, state)
            kernel = found.state.params["dense"]["kernel"]
            assert kernel.sharding == target.params["dense"]["kernel"].sharding
            assert len(kernel.sharding.device_set) == count
            assert found.state.key.sharding.device_set == kernel.sharding.device_set


def test_digests_do_not_depend_on_the_mesh(tmp_path):
    state, texts = make_state(5), []
    for count in (1, 8):
        with Checkpointer(tmp_path / str(count)) as saver:
            saver.save(0, spread(state, count), meta={})
        texts.append((tmp_path / str(count) / "0" / "meta" / "digests-0.json").read_text())
    assert texts[0] == texts[1]


def test_the_state_saved_is_the_one_at_save_time(tmp_path):
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 1.01 + 1, s), donate_argnums=0)
    state = {"w": jnp.arange(400_000.0).reshape(400, 1000), "ema": jnp.ones((1000,))}
    with Checkpointer(tmp_path, keep_last=None) as saver:
        for number in range(4):
            wanted = jax.tree.map(np.array, state)
            saver.save(number, state, meta={})
            for _ in range(10):
                state = step(state)
            found = Checkpointer(tmp_path, read_only=True)
            saver.wait()
            assert same(found.restore(number, wanted).state, wanted)
        with pytest.raises(ValueError, match="w was donated before it was saved"):
            old, state = state, step(state)
            saver.save(9, old, meta={})


def test_first_save_blocks_the_next_does_not(tmp_path, monkeypatch):
    waits = []
    with Checkpointer(tmp_path) as saver:
        real = saver.wait
        monkeypatch.setattr(saver, "wait", lambda: (waits.append(saver._pending is not None), real())[1])
        saver.save(1, make_state(1), meta={})
        assert waits == [False, True] and saver.steps() == [1]
        saver.save(2, make_state(2), meta={})
        assert waits == [False, True, False]


def test_what_does_not_fit_is_refused_and_left_alone(tmp_path):
    state = make_state(2)
    with Checkpointer(tmp_path) as saver:
        saver.save(2, state, meta={})
        before = sorted(str(path) for path in tmp_path.rglob("*"))

        def refused(target, *words):
            for call in (saver.restore_latest, lambda t: saver.restore(2, t)):
                with pytest.raises(CheckpointError) as caught:
                    call(target)
                text = str(caught.value)
                assert "\n" not in text and all(word in text for word in words), text
            assert sorted(str(path) for path in tmp_path.rglob("*")) == before

        params = lambda **new: dataclasses.replace(state, params={**state.params, **new})
        wide = params(dense={"kernel": jnp.zeros((16, 9))})
        refused(wide, "params/dense/kernel", "float32[16,8] in the checkpoint", "float32[16,9] is expected")
        refused(params(half=jnp.zeros((8, 4))), "params/half", "bfloat16[8,4]", "float32[8,4]")  # no silent cast
        refused(params(halff=state.params["half"]), "params/halff is missing", "bfloat16[8,4]")
        less = {k: v for k, v in state.params.items() if k not in ("half", "empty")}
        refused(dataclasses.replace(state, params=less), "params/empty", "no such leaf", "and 1 more leaves differ")
        refused(dataclasses.replace(state, ema=None), "ema/model/0", "no such leaf")
        refused(dataclasses.replace(state, key=jax.random.key(0, impl="rbg")), "key", "key<fry>[]", "key<rbg>[]")


def test_strangers_and_newer_formats(tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(tmp_path / "stranger") as manager:
        manager.save(4, args=ocp.args.StandardSave({"w": jnp.ones(3)}))
    with (
        Checkpointer(tmp_path / "stranger") as reader,
        pytest.raises(CheckpointError, match="not written by jaxdiff"),
    ):
        reader.restore_latest(make_state())
    assert (tmp_path / "stranger" / "4").is_dir()

    with Checkpointer(tmp_path / "newer") as saver:
        monkeypatch.setattr("jaxdiff.train.checkpoint.FORMAT", 99)
        saver.save(4, make_state(), meta={})
        with pytest.raises(CheckpointError, match=r"has format 99, jaxdiff .* reads format 1"):
            saver.restore_latest(make_state())
    assert (tmp_path / "newer" / "4").is_dir()


def test_bad_arguments_write_nothing(tmp_path):
    with pytest.raises(ValueError, match="keep_last=0"):
        Checkpointer(tmp_path / "x", keep_last=0)
    with pytest.raises(ValueError, match="best_mode='low'"):
        Checkpointer(tmp_path / "x", best_mode="low")
    with Checkpointer(tmp_path / "y") as saver:
        with pytest.raises(ValueError, match="not JSON: meta holds a object"):
            saver.save(1, make_state(), meta={"x": object()})
        with pytest.raises(ValueError, match="leaf 'name' of the state is a str"):
            saver.save(1, {"name": "x"}, meta={})
        with pytest.raises(ValueError, match="two leaves of the state are both named"):
            saver.save(1, {"a": [{1: jnp.ones(2)}], "b": {"c": {"1": 1.0}}, "d": Twin(1, 2)}, meta={})
        with pytest.raises(ValueError, match="step=-1"):
            saver.save(-1, make_state(), meta={})
        assert list((tmp_path / "y").iterdir()) == []


class Twin:
    """A node whose children have the same name."""

    def __init__(self, a, b):
        self.a, self.b = a, b


jax.tree_util.register_pytree_with_keys(
    Twin,
    lambda t: (((jax.tree_util.DictKey(1), t.a), (jax.tree_util.DictKey("1"), t.b)), None),
    lambda _, children: Twin(*children),
)


def test_retention(tmp_path):
    small = {"w": jnp.ones(3)}
    with Checkpointer(tmp_path, keep_last=2, keep_every=4, best_metric="loss") as saver:
        for step in range(1, 11):
            loss = {3: 0.5, 5: 0.1, 7: float("nan")}.get(step, 1.0)
            saver.save(step, small, meta={"metrics": {"loss": loss}})
        saver.wait()
        assert saver.steps() == [4, 5, 8, 9, 10] and saver.best_step() == 5
    with Checkpointer(tmp_path / "max", keep_last=1, best_metric="score", best_mode="max") as saver:
        for step, score in enumerate([0.1, 0.9, 0.3, 0.2]):
            saver.save(step, small, meta={}, metrics={"score": score})
        saver.wait()
        assert saver.steps() == [1, 3]
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".deleting")]


def test_a_best_metric_that_checkpoints_lack_is_said(tmp_path, caplog):
    with Checkpointer(tmp_path, keep_last=1, best_metric="los") as saver:
        saver.save(1, {"w": jnp.ones(3)}, meta={})
        assert not caplog.records  # no metrics yet
        saver.save(2, {"w": jnp.ones(3)}, meta={"metrics": {"loss": 0.5}})
        saver.wait()
    assert "best_metric: 'los' is not a metric of checkpoint 2; did you mean 'loss'?; there are loss" in caplog.text


def test_retention_never_deletes_the_last_that_verifies(tmp_path, caplog):
    with Checkpointer(tmp_path, keep_last=1) as saver:
        saver.save(1, {"w": jnp.arange(64.0)}, meta={})
        real = saver._writer.wait_until_finished

        def rot():  # the disk loses every later save between commit and retention
            real()
            for path in tmp_path.glob("[2-9]/meta/record.json"):
                path.write_text("")

        saver._writer.wait_until_finished = rot
        saver.save(2, {"w": jnp.arange(64.0)}, meta={}, blocking=True)
        saver.save(3, {"w": jnp.arange(64.0)}, meta={}, blocking=True)
        assert saver.steps() == [1, 2, 3]
        assert "nothing is deleted" in caplog.text
        saver._writer.wait_until_finished = real
        saver.save(4, {"w": jnp.arange(64.0)}, meta={}, blocking=True)
        assert saver.steps() == [4]  # once a newer one verifies the rest may go


def test_states_of_other_kinds(tmp_path):
    with Checkpointer(tmp_path) as saver:
        saver.save(0, {"params": [jnp.ones(2), (jnp.zeros(3),)], "ema": jnp.ones(2)}, meta={})
        target = {"params": [jnp.zeros(2), (jnp.ones(3),)], "ema": jnp.zeros(2)}
        assert same(saver.restore(0, target).state, {"params": [jnp.ones(2), (jnp.zeros(3),)], "ema": jnp.ones(2)})
        assert np.array_equal(saver.restore_ema(0).state, np.ones(2))
        saver.save(1, State(1, 2.5, {}, None, jax.random.split(jax.random.key(0), 8)), meta={})
        keys = spread(jax.random.split(jax.random.key(1), 8), 8, abstract=True)
        back = saver.restore_latest(State(0, 0.0, {}, None, keys)).state
        assert back.step == 1 and back.params == 2.5 and len(back.key.sharding.device_set) == 8
        assert same(back.key, jax.random.split(jax.random.key(0), 8))


def test_config_differences():
    saved = json.loads(json.dumps({"model": {"d": 64, "names": ("a", "b")}, "lr": 1e-3, "steps": 10, "ema": True}))
    given = {"model": {"d": 128, "names": ["a", "b"], "remat": False}, "lr": 1e-3, "steps": 20, "ema": 1}
    lines = [str(difference) for difference in check_same_config(saved, given, ignore=["steps"])]
    assert lines == [
        "model.d: saved 64, given 128",
        "model.remat: saved absent, given False",
        "ema: saved True, given 1",
    ]
    assert check_same_config(saved, {**saved, "steps": 5}, ignore=["steps"]) == []
