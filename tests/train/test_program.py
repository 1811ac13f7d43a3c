"""The kept program: a restart that finds it traces nothing and gets the same bits; anything odd compiles as ever."""

import jax
import pytest
from etils import epath
from jax.experimental.compilation_cache import compilation_cache
from tiny_training import Pipeline, assert_bitwise, devices, init, player

from jaxdiff.commands.program import Program, identity, preload
from jaxdiff.train import Checkpointer, train


@pytest.fixture(autouse=True)
def no_compile_cache():
    """What the cache gave cannot be kept, so these tests compile for themselves."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # whether it is used is asked once
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def never(params, batch, keys, ctx):
    raise AssertionError("traced")


def go(folder, steps, name="a", mesh=None, loss=None, keep=True):
    mesh = mesh or devices(2)
    program = Program(epath.Path(folder) / "step.program", identity(mesh, {"name": name})) if keep else None
    game = {"net": player() if loss is None else player(loss=loss)}
    with Checkpointer(folder / "checkpoints") as checkpointer:
        return train(
            game, init, Pipeline(), steps=steps, mesh=mesh, checkpointer=checkpointer, program=program,
            save_every=10, log_every=10, seed=5,
        )  # fmt: skip


def test_restart_traces_nothing_and_ends_bitwise_equal(tmp_path, monkeypatch):
    straight = go(tmp_path / "straight", 40, keep=False)
    (tmp_path / "run").mkdir()
    go(tmp_path / "run", 20)
    assert (tmp_path / "run" / "step.program").exists()
    with monkeypatch.context() as patch:  # its key is kept too: nothing small is compiled either
        patch.setattr("jax.random.split", never)
        resumed = go(tmp_path / "run", 40, loss=never)  # would raise if the step were traced
    assert resumed.step == 40
    assert_bitwise(straight.state, resumed.state)
    assert straight.row["loss"] == resumed.row["loss"]
    preload(tmp_path / "run")  # the same, begun in the background
    again = go(tmp_path / "run", 60, loss=never)
    assert_bitwise(again.state, go(tmp_path / "straight", 60, keep=False).state)
    preload(tmp_path)  # nothing there


def test_anything_odd_compiles_as_ever(tmp_path, caplog):
    go(tmp_path, 10)
    kept = tmp_path / "step.program"
    written = kept.read_bytes()
    for change in (
        {"name": "b"},  # another config
        {"mesh": devices(4)},  # other devices
    ):
        with pytest.raises(AssertionError, match="traced"):
            go(tmp_path, 20, loss=never, **change)
    for damage in (written[:-1], written[:5000] + bytes([written[5000] ^ 1]) + written[5001:], b"", b"x" * 80):
        kept.write_bytes(damage)
        with pytest.raises(AssertionError, match="traced"):
            go(tmp_path, 20, loss=never)
    kept.write_bytes(written)
    with pytest.MonkeyPatch.context() as patch:  # another processor, another jax
        patch.setattr("jaxdiff.commands.program._processor", lambda: ["other"])
        preload(tmp_path)
        with pytest.raises(AssertionError, match="traced"):
            go(tmp_path, 20, loss=never)
    # what is whole and cannot be linked all the same is reported, and compiled
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jax.experimental.serialize_executable.deserialize_and_load", lambda *_, **__: 1 / 0)
        with pytest.raises(AssertionError, match="traced"):
            go(tmp_path, 20, loss=never)
    assert "could not be loaded, the step is compiled: ZeroDivisionError" in caplog.text
    assert go(tmp_path, 20, loss=never).step == 20


def test_a_program_that_has_not_answered_has_no_key(tmp_path):
    with pytest.raises(RuntimeError, match="no kept program has answered"):
        Program(epath.Path(tmp_path / "step.program"), "x").key(devices(1))


def test_what_the_compile_cache_gave_is_not_kept(tmp_path, monkeypatch):
    compiled = jax.stages.Lowered.compile

    def from_cache(self, *args, **options):
        jax.monitoring.record_event("/jax/compilation_cache/cache_hits")
        return compiled(self, *args, **options)

    monkeypatch.setattr(jax.stages.Lowered, "compile", from_cache)
    assert go(tmp_path, 10).step == 10 and not (tmp_path / "step.program").exists()


def test_a_place_that_cannot_be_written_costs_nothing(tmp_path, caplog):
    mesh = devices(2)
    program = Program(epath.Path(tmp_path / "missing" / "step.program"), identity(mesh, {}))
    train({"net": player()}, init, Pipeline(), steps=10, mesh=mesh, program=program)
    assert "was not written" in caplog.text


def test_identity_names_what_the_step_depends_on(tmp_path, monkeypatch):
    base = identity(devices(2), {"lr": 1})
    assert base == identity(devices(2), {"lr": 1}) and len(base) == 64
    others = [identity(devices(2), {"lr": 2}), identity(devices(4), {"lr": 1})]
    with jax.enable_x64(True):
        others.append(identity(devices(2), {"lr": 1}))
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    others.append(identity(devices(2), {"lr": 1}))
    monkeypatch.undo()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0")
    others.append(identity(devices(2), {"lr": 1}))
    monkeypatch.undo()
    (tmp_path / "__init__.py").write_text("")
    monkeypatch.setattr("jaxdiff.__file__", str(tmp_path / "__init__.py"))
    others.append(identity(devices(2), {"lr": 1}))
    assert len({base, *others}) == 1 + len(others)
