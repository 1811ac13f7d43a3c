"""`jaxdiff plan` and its counters against counts made by hand."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import cli
from jaxdiff import config as config_lib
from jaxdiff.commands import plan
from jaxdiff.network import make_dit
from jaxdiff.train import cost
from jaxdiff.train.chips import CHIPS, communication_seconds

S = jax.ShapeDtypeStruct
WIDTH, DEPTH, TOKENS, PATCH, BATCH, FEATURES = 128, 2, 16, 2, 32, 256


def dit_config():
    config = config_lib.default()
    config.network.name = "dit"
    for name, value in {"width": WIDTH, "depth": DEPTH, "heads": 2, "patch": PATCH}.items():
        config.network[name] = value
    config.data.batch_size = BATCH
    return config_lib.check(config)


def dit_macs(width, depth, tokens, patch_features):
    """Multiply-adds of one example: (matrices applied to tokens, and attention), (modulation and conditioning)."""
    block = tokens * (12 * width**2 + 2 * tokens * width) + 6 * width**2
    ends = 2 * tokens * patch_features * width + 2 * width**2
    return depth * block + ends + FEATURES * width + width**2


def test_published_dit_xl_2_forward():
    """118.6 GMAC (arXiv 2212.09748, table 4), from shapes alone."""
    net = make_dit(size="XL/2", num_classes=1000)
    args = S((1, 32, 32, 4), jnp.float32), S((1,), jnp.float32), S((1,), jnp.int32)
    params = jax.eval_shape(net.init, jax.random.key(0), *args)
    count = cost.flops(jax.make_jaxpr(net.apply)(params, *args))
    assert count == 2 * dit_macs(1152, 28, 256, 16)
    assert count / 2e9 == pytest.approx(118.6, abs=0.05)


def test_flops_of_loops_branches_and_convolutions():
    x = S((8, 8), jnp.float32)

    def looped(x):
        y, _ = jax.lax.scan(lambda c, _: (c @ x, None), x, length=50)
        return jax.lax.cond(y[0, 0] > 0, lambda y: y @ y @ y, lambda y: y @ y, jax.checkpoint(lambda y: y @ y)(y))

    assert cost.flops(jax.make_jaxpr(looped)(x)) == (50 + 1 + 2) * 2 * 8**3
    convolve = lambda a, k: jax.lax.conv_general_dilated(
        a, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
    )
    found = cost.flops(jax.make_jaxpr(convolve)(S((3, 8, 8, 6), jnp.float32), S((3, 3, 3, 4), jnp.float32)))
    assert found == 2 * (3 * 4 * 4 * 4) * (3 * 3 * 3)


def test_activations_of_an_mlp():
    """sin keeps y for the next matrix and cos for its slope; remat keeps the block's input alone."""
    params = {name: S(shape, jnp.float32) for name, shape in {"a": (5, 7), "b": (7, 9), "c": (9, 3)}.items()}
    x = S((11, 5), jnp.float32)

    def loss(p, x, wrap=lambda f: f):
        y = jnp.sin(x @ p["a"])
        y = wrap(lambda p, y: jnp.sin(y @ p["b"]))(p, y)
        return jnp.sum(y @ p["c"])

    assert cost.activation_bytes(loss, params, x) == 4 * 11 * 2 * (7 + 9)
    remat = lambda p, x: loss(p, x, jax.checkpoint)
    assert cost.activation_bytes(remat, params, x) == 4 * 11 * (2 * 7 + 9)
    assert cost.recomputed_bytes(remat, params, x) == 4 * 11 * 9  # the block's own cos, while it is recomputed
    assert cost.recomputed_bytes(loss, params, x) == 0


@pytest.fixture(scope="module", params=["dp", "fsdp"])
def planned(request):
    sizes = (8, 1, 1) if request.param == "dp" else (2, 4, 1)
    return request.param, plan.make_plan(dit_config(), sizes, shape=(8, 8, 3), classes=10, min_bytes=4096)


def test_arguments_and_flops_by_hand(planned):
    kind, found = planned
    n = found.parameters
    # of a block: modulation, qkv, out, two mlp matrices; around them: embedding, conditioning, classes, final
    matrices = DEPTH * 18 * WIDTH**2 + 2 * 12 * WIDTH + FEATURES * WIDTH + WIDTH**2 + 2 * WIDTH**2
    biases = DEPTH * (6 + 3 + 1 + 4 + 1) * WIDTH + WIDTH + 12 + 2 * WIDTH + 2 * WIDTH
    assert n == matrices + biases + 11 * WIDTH
    batch = BATCH // 8 * (8 * 8 * 3 * 4 + 4 + 4)
    # master, two moments, average; split in four they leave behind what is below 4 kB or does not divide
    hand = 16 * n // (1 if kind == "dp" else 4) + batch
    assert found.argument_bytes == pytest.approx(hand, rel=0.02)
    assert found.compiled_arguments == pytest.approx(hand, rel=0.02)
    assert found.compiled_arguments == pytest.approx(found.argument_bytes, rel=1e-3)
    # forward once, backward twice; nothing before the first matrices needs a gradient
    forward = 2 * dit_macs(WIDTH, DEPTH, TOKENS, 12)
    assert found.flops == pytest.approx(3 * forward * BATCH / 8, rel=0.02)
    assert found.flops < 3 * forward * BATCH / 8


def test_collectives(planned):
    kind, found = planned
    large = [c for c in found.collectives if c.bytes * c.times > 1e6]
    if kind == "dp":
        assert [(c.kind, c.group, c.times) for c in large] == [("all-reduce", 8, 1)]
        assert large[0].bytes == pytest.approx(4 * found.parameters, rel=1e-3)
        assert large[0].bytes >= 4 * found.parameters
    else:
        gathered = [c for c in found.collectives if c.kind == "all-gather"]
        split = sum(c.bytes * c.times for c in gathered)
        assert split == pytest.approx(4 * found.parameters, rel=0.03)  # once each, small ones were never split
        assert {c.group for c in gathered} == {4}


def test_explicit_fsdp_by_hand():
    """Under remat: bytes and FLOPs within 2 %, two gathers and one scatter a block, of known bytes and span."""
    config = dit_config()
    config.network.remat = True
    config.mesh.fsdp_mode, config.mesh.min_bytes = "explicit", 4096
    found = plan.make_plan(config_lib.check(config), (2, 4, 1), shape=(8, 8, 3), classes=10)
    hand = 16 * found.parameters // 4 + BATCH // 8 * (8 * 8 * 3 * 4 + 4 + 4)
    assert found.argument_bytes == pytest.approx(hand, rel=0.02)
    assert found.compiled_arguments == pytest.approx(hand, rel=0.02)
    # the blocks once more, recomputed
    forward, ends = 2 * dit_macs(WIDTH, DEPTH, TOKENS, 12), 2 * dit_macs(WIDTH, 0, TOKENS, 12)
    assert found.flops == pytest.approx((4 * forward - ends) * BATCH / 8, rel=0.02)
    block = 18 * WIDTH**2  # its biases are below 4 kB each
    assert found.traced
    gathers = [c for c in found.collectives if c.kind == "all-gather"]
    scatters = [c for c in found.collectives if c.kind == "reduce-scatter"]
    assert {(c.group, c.axes, c.times) for c in gathers + scatters} == {(4, ("fsdp",), 1)}
    assert [c.bytes for c in gathers].count(4 * block) == 2 * DEPTH
    assert [c.bytes for c in scatters].count(block) == DEPTH
    # above 1 MB there is nothing else
    assert {c.bytes for c in found.collectives if c.bytes > 1e6} == {4 * block}
    assert sum(c.bytes == block and c.axes == ("data",) for c in found.collectives) == DEPTH
    assert found.gradient_bytes == found.working_bytes == 4 * found.parameters
    # split arrays are scattered over fsdp and then summed over data; together with the rest that is every parameter
    split = sum(c.bytes for c in scatters)
    assert sum(c.bytes for c in found.collectives if c.axes == ("data",)) == split
    rest = sum(c.bytes for c in found.collectives if c.kind == "all-reduce" and c.group == 8)
    assert 4 * split + rest == pytest.approx(4 * found.parameters, rel=1e-3)
    # a larger mesh than is simulated spans its own devices
    config.data.batch_size = 16 * BATCH
    cut = plan.make_plan(config, (32, 4, 1), shape=(8, 8, 3), classes=10, compiled=False)
    assert {c.group for c in cut.collectives} == {4, 32, 128} and cut.flops == found.flops


def test_layers_split_over_tensor():
    """A network's own rules are planned with; without any rule the devices along tensor repeat the same work."""
    sizes = {"shape": (8, 8, 3), "classes": 10}
    whole = plan.make_plan(dit_config(), (4, 1, 1), **sizes, compiled=False)
    split = plan.make_plan(dit_config(), (4, 1, 2), **sizes)
    assert split.flops == whole.flops // 2 and any("divided evenly over tensor" in note for note in split.notes)
    halved = DEPTH * (12 * WIDTH**2 + 7 * WIDTH)  # matrices, and the biases of what is split by column
    hand = 16 * (whole.parameters - halved // 2) + BATCH // 4 * (8 * 8 * 3 * 4 + 4 + 4)
    assert split.argument_bytes == pytest.approx(hand, rel=1e-3)
    assert split.compiled_arguments == pytest.approx(hand, rel=1e-3)
    assert split.gradient_bytes == pytest.approx(4 * (whole.parameters - halved // 2), rel=1e-6)
    config = dit_config()
    config.mesh.rules = [[".", "replicated"]]
    repeated = plan.make_plan(config_lib.check(config), (4, 1, 2), **sizes, compiled=False)
    assert repeated.flops == whole.flops and repeated.argument_bytes == whole.argument_bytes
    assert any("no rule splits anything over tensor=2" in note for note in repeated.notes)


def test_groups_of_a_mesh_cut_to_fit_are_the_whole_mesh_s():
    """Compiled with two replicas in place of sixteen: the sum over data is over sixteen all the same."""
    config = dit_config()
    config.mesh.min_bytes, config.data.batch_size = 4096, 8 * BATCH
    found = plan.make_plan(config_lib.check(config), (16, 4, 1), shape=(8, 8, 3), classes=10)
    assert found.simulated == 2
    spans = {(c.axes, c.group) for c in found.collectives}
    assert (("data",), 16) in spans and spans <= {(("data",), 16), (("fsdp",), 4), (("data", "fsdp"), 64)}


def test_two_replicas_are_simulated_at_least(monkeypatch):
    flags = []
    monkeypatch.setattr(
        plan.subprocess, "run", lambda *_, env: flags.append(env["XLA_FLAGS"]) or types.SimpleNamespace(returncode=0)
    )
    config = dit_config()
    config.data.batch_size = 8 * 512
    for mesh, devices in (("8x512x1", 1024), ("1x512x1", 512), ("8x128x1", 512)):
        assert plan.run(config_lib.check(config), mesh, shape="8x8x3", classes=10) == 0
        assert f"device_count={devices}" in flags[-1]


def test_only_what_crosses_slices_takes_the_slow_network():
    chip = CHIPS[0]
    written = [
        cost.Collective("all-gather", 10**9, 4, 1, ("fsdp",)),
        cost.Collective("all-reduce", 10**9, 4, 1, ("data",)),
    ]
    compiled = [dataclasses.replace(c, axes=()) for c in written]
    known = {
        **{"mesh": (4, 4, 1), "simulated": 4, "batch": 64, "local": 4, "parameters": 10**6, "batch_bytes": 1000},
        **{"argument_bytes": 2000, "gradient_bytes": 0, "working_bytes": 0, "flops": 10**12, "params_bytes": 0},
        **{"activation_fixed": 0, "activation_each": 1e6, "compiled_arguments": None, "opt_bytes": 0, "ema_bytes": 0},
        **{"precision": "bfloat16", "notes": ()},
    }
    for found in (written, compiled):
        for slices, speed in ((1, chip.link), (2, chip.outer)):
            text = plan.report(plan.Plan(**known, collectives=tuple(found), slices=slices))
            row = next(line for line in text.splitlines() if line.strip().startswith(chip.name))
            wanted = 3 / 4 * 1e9 / chip.link + 2 * 3 / 4 * 1e9 / speed
            assert f" {wanted * 1e3:.3g} ms" in row
            assert ("in 2 slices" in text) == (slices == 2)


def test_a_mesh_cut_to_fit_plans_the_same_device():
    sizes = {"shape": (8, 8, 3), "classes": 10, "compiled": False}
    whole = plan.make_plan(dit_config(), (8, 1, 1), **sizes)
    config = dit_config()
    config.data.batch_size = 4 * BATCH
    cut = plan.make_plan(config, (32, 1, 1), **sizes)
    assert cut.simulated == 8 and any("data=8 in place of 32" in note for note in cut.notes)
    for name in ("flops", "argument_bytes", "local", "activation_each", "total_bytes"):
        assert getattr(cut, name) == getattr(whole, name)


def test_accumulation_counts_every_microbatch():
    sizes = {"shape": (8, 8, 3), "classes": 10, "compiled": False}
    whole = plan.make_plan(dit_config(), (4, 1, 1), **sizes)
    config = dit_config()
    config.train.accumulate = 4
    parts = plan.make_plan(config, (4, 1, 1), **sizes)
    assert parts.flops == whole.flops and parts.local == whole.local // 4
    assert parts.activation_each == pytest.approx(whole.activation_each)


def test_hlo_of_loops_groups_and_starts():
    text = """HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %r = f32[256]{0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add
}

%cond (p: (s32[], f32[4])) -> pred[] {
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[256]) -> f32[256] {
  %w = (s32[], f32[4]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %g = (f32[2]{0}, f32[8]{0}) all-gather-start(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %d = f32[8]{0} all-gather-done(%g)
  %m = f32[64] all-gather(%p), replica_groups=mesh['x'=4,'y'=1,'z'=2], device_ids=([2,4]T(1,0)) {'x'}, dimensions={0}
  %n = f32[32] all-gather(%p), replica_groups=mesh['x'=4,'z'=2] {'x':(1)2, 'z'}, dimensions={0}
  %two = (bf16[3,5]{1,0}, f32[]) all-reduce(%a, %b), replica_groups={}, to_apply=%add
}
"""
    found = {(c.kind, c.bytes, c.group, c.times) for c in cost.collectives(text, 8)}
    assert found == {
        ("all-reduce", 1024, 4, 5),
        ("all-gather", 32, 4, 1),
        ("all-gather", 256, 4, 1),
        ("all-gather", 128, 4, 1),
        ("all-reduce", 34, 8, 1),
    }


def test_axes_of_compiled_collectives():
    """By the places of a replica group's devices in a mesh of 2 x 2 x 2, in every notation."""
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    for groups, axes in (
        ("{{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("{{0,2},{1,3},{4,6},{5,7}}", ("fsdp",)),
        ("[4,2]<=[8]", ("tensor",)),
        ("[4,2]<=[2,4]T(1,0)", ("data",)),
        ("[2,4]<=[4,2]T(1,0)", ("data", "fsdp")),
        ("{}", ("data", "fsdp", "tensor")),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c'}", ("data",)),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", ("fsdp", "tensor")),
        ("mesh['a'=4,'b'=2] {'a':(1)2}", ("data",)),
        ("mesh['a'=4,'b'=2] {'a':(2)2, 'b'}", ("fsdp", "tensor")),
        ("mesh['a'=8] {'a'}", ("data", "fsdp", "tensor")),
    ):
        text = f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  %r = f32[8]{{0}} all-reduce(%x), replica_groups={groups}, a=b\n}}"
        assert [c.axes for c in cost.collectives(text, 8, sizes)] == [axes]


@pytest.mark.slow
def test_explicit_fsdp_beside_tensor():
    """What crosses ``tensor`` is read from the compiled step, beside the gathers and scatters that are written in it."""
    config = dit_config()
    config.network.remat = True
    config.mesh.fsdp_mode, config.mesh.min_bytes = "explicit", 4096
    found = plan.make_plan(config_lib.check(config), (2, 2, 2), shape=(8, 8, 3), classes=10)
    over = [c for c in found.collectives if c.axes == ("tensor",)]
    assert {c.group for c in over} == {2}
    # of a block: a sum of every token after the attention and after the MLP, forward, recomputed or backward
    tokens = 4 * (BATCH // 4) * TOKENS * WIDTH
    assert sum(c.times for c in over if c.kind == "all-reduce" and c.bytes >= tokens) >= 4 * DEPTH
    assert {c.axes for c in found.collectives if c.kind == "reduce-scatter"} == {("fsdp",)}


def test_network_time_by_hand():
    chip = CHIPS[0]
    ring = [cost.Collective("all-reduce", 10**9, 8, 2), cost.Collective("all-gather", 10**9, 16, 1)]
    expected = 2 * 2 * 7 / 8 * 1e9 / chip.link + 15 / 16 * 1e9 / chip.outer
    assert communication_seconds(ring, chip) == pytest.approx(expected)


def test_report_warns_when_it_does_not_fit():
    state = {"params_bytes": 4 * 10**10, "opt_bytes": 8 * 10**10, "ema_bytes": 4 * 10**10}
    known = {
        **{"mesh": (8, 1, 1), "simulated": 8, "batch": 64, "local": 8, "parameters": 10**10, "batch_bytes": 1000},
        **{"argument_bytes": 16 * 10**10 + 1000, "gradient_bytes": 4 * 10**10, "working_bytes": 0, "flops": 10**15},
        **{"activation_fixed": 0, "activation_each": 1e9, "compiled_arguments": None, "collectives": None},
        **{"precision": "bfloat16", "notes": (), **state},
    }
    text = plan.report(plan.Plan(**known))
    assert text.count("warning:") == len(CHIPS) and "the state alone is too large" in text
    small = known | dict.fromkeys(state, 0) | {"gradient_bytes": 0, "argument_bytes": 1000}
    text = plan.report(plan.Plan(**small), mfu=0.5)
    assert "warning" not in text
    # 0.92 * 80 GB at 1 GB + 125 B an example; 1 PFLOP at half of 989.4 TFLOP/s
    row = next(line for line in text.splitlines() if "H100" in line and "yes" in line)
    assert row.endswith(f" {8 * int(0.92 * 80e9 / (1e9 + 125)):,}") and "2.02 s" in row


@pytest.mark.slow
def test_command_line(tmp_path, capfd):
    file = tmp_path / "tiny.py"
    file.write_text(
        "from jaxdiff.config import default\ndef get_config():\n    config = default()\n"
        "    config.network.name = 'mlp'\n    return config\n"
    )
    words = ["plan", "--config", str(file), "--shape", "2", "--config.data.batch_size=256"]
    assert cli.main([*words, "--mesh", "16x2x1"]) == 0
    out = capfd.readouterr().out
    assert "= 32 devices" in out and "v6e" in out
    assert re.search(r"all-reduce +1 x over 32 devices", out)
    assert cli.main([*words, "--mesh", "16x2"]) == 2
    assert "DATAxFSDPxTENSOR" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("mesh", "keywords", "words"),
    [
        ("3x1x1", {}, "batch_size: 32 is not divisible by 3"),
        ("0x1x1", {}, "at least 1"),
        (None, {}, "give --mesh"),
        ("1x1024x1", {}, "at most 512"),
        ("8x1x1", {"mfu": 1.5}, "share in"),
        ("8x1x1", {"shape": "8xx3"}, "need sizes"),
    ],
)
def test_refusals(mesh, keywords, words):
    with pytest.raises(config_lib.ConfigError, match=re.escape(words)):
        plan.run(dit_config(), mesh, **keywords)


def test_typed_key_bytes():
    assert cost.nbytes(jax.random.key(0)) == 8
    assert cost.nbytes(S((3, 5), jnp.bfloat16)) == 30 and np.dtype(jnp.bfloat16).itemsize == 2
