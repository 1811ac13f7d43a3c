"""Config names, overrides and their errors."""

import json
import pathlib
import subprocess
import sys

import pytest

from jaxdiff import cli
from jaxdiff import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("kind", sorted(config_lib.NAMES))
def test_names_resolve_and_match_the_rooms(kind):
    import jaxdiff as jd
    from jaxdiff.train.optimiser import OPTIMISERS

    registries = {
        "process": jd.process.PROCESSES,
        "network": jd.network.NETWORKS,
        "solver": jd.solver.SOLVERS,
        "grid": jd.solver.GRIDS,
        "guidance": jd.guidance.GUIDANCES,
        "noise": jd.process.LAWS,
        "optimiser": OPTIMISERS,
    }
    names = set(config_lib.NAMES[kind]) - {"none"}
    assert names == set(registries[kind])
    if kind != "optimiser":
        for name in names:
            assert callable(config_lib.resolve(kind, name))


def test_listed_names_match_the_rooms():
    from jaxdiff import prediction
    from jaxdiff.objective.time import TIMES
    from jaxdiff.objective.weighting import WEIGHTINGS

    assert set(config_lib.TARGETS) == set(prediction.TARGETS)
    assert set(config_lib.TIMES) == set(TIMES)
    assert set(config_lib.WEIGHTINGS) == set(WEIGHTINGS)


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/*.py")), ids=lambda f: f.stem)
def test_config_files_check(file):
    config_lib.check(config_lib.load(str(file)))


def test_mnist_has_two_sizes():
    file = str(ROOT / "configs/mnist.py")
    cpu, gpu = (config_lib.check(config_lib.load(f"{file}:{machine}")) for machine in ("cpu", "gpu"))
    assert cpu.train.steps * cpu.data.batch_size < gpu.train.steps * gpu.data.batch_size
    assert (cpu.data.name, cpu.objective.to_dict()) == (gpu.data.name, gpu.objective.to_dict())
    with pytest.raises(config_lib.ConfigError, match=r"mnist\.py:tpu given; allowed after the colon: cpu, gpu"):
        config_lib.load(f"{file}:tpu")


def test_options_in_dicts_reach_what_they_are_for():
    from jaxdiff.commands import assemble

    given = {"network.name": "mlp", "objective.coupling": "ot", "objective.coupling_options": "{'method': 'sinkhrn'}"}
    config = config_lib.check(config_lib.apply_overrides(config_lib.default(), given))
    with pytest.raises(ValueError, match=r"method: 'sinkhrn' is unknown; .*did you mean 'sinkhorn'"):
        assemble.game(assemble.setup(config, assemble.dataset(config, "train")))


def test_overrides_take_the_field_type():
    config = config_lib.default()
    given = {
        "solver.steps": "8",
        "process.name": "vp",
        "process.beta_max": "15",
        "data.flip": "true",
        "ema.decay": "0",
    }
    config_lib.check(config_lib.apply_overrides(config, given))
    assert (config.solver.steps, config.process.beta_max, config.data.flip, config.ema.decay) == (8, 15, True, 0)


def test_another_name_drops_the_old_options():
    config = config_lib.load(str(ROOT / "configs/digits.py"))
    config_lib.check(config_lib.apply_overrides(config, {"network.name": "mlp"}))
    assert config_lib.options(config, "network") == {}
    for given in ({"solver.name": "ddim", "solver.eta": "0.5"}, {"solver.eta": "0.5", "solver.name": "ddim"}):
        config = config_lib.check(config_lib.apply_overrides(config_lib.default(), given))
        assert config_lib.options(config, "solver") == {"eta": 0.5}  # in whatever order they are given


BAD = [
    ({"solver.nmae": "heun"}, "allowed", "name"),
    ({"solver.name": "heum"}, "did you mean 'heun'", None),
    ({"sovler.name": "heun"}, "no such field; did you mean 'solver.name'", None),
    (
        {"solver.stepz": "3"},
        "; did you mean 'steps'?",
        None,
    ),
    ({"solver.steps": "0"}, "config.solver.steps: 0 given; need at least 1", None),
    ({"solver.steps": "many"}, "need a whole number", None),
    ({"solver.steps": "2.5"}, "need a whole number", None),
    ({"train.tensorboard": "3"}, "need True or False", None),
    ({"optimiser.learning_rate": "fast"}, "need a number", None),
    ({"process.beta_max": "3"}, "'linear' has no such option", None),
    ({"objective.target": "epsilon"}, "allowed: data, noise, vpred", None),
    ({"objective.label_drop": "1.5"}, "need 0..1", None),
    ({"objective.time": "logit_normal", "objective.time_options": "{'men': 1}"}, "did you mean 'mean'", None),
    ({"objective.time_options": "{'mean': 1}"}, "'uniform' has no option 'mean'; allowed: none", None),
    ({"objective.weighting": "min_snr", "objective.weighting_options": "{'gama': 1}"}, "did you mean 'gamma'", None),
    ({"objective.coupling": "ot", "objective.coupling_options": "{'group': 4}"}, "allowed: method, per_class", None),
    ({"network.name": "mlp", "network.width": "abc"}, "config.network.width: 'abc' given; need a whole number", None),
    ({"network.name": "mlp", "network.depth": "1.5"}, "config.network.depth: 1.5 given; need a whole number", None),
    ({"network.name": "mlp", "network.width": "True"}, "need a whole number", None),
    ({"solver.order": "'two'"}, "config.solver.order", None),
    (
        {"solver.grid_options": "{'t_min': 'a'}"},
        "config.solver.grid_options['t_min']: 'a' given; need a number",
        None,
    ),
    ({"process.name": "vp", "process.beta_max": "high"}, "need a number", None),
    ({"objective.coupling": "ot", "objective.coupling_group": "48"}, "it must divide the 128 examples", None),
    ({"solver.grid": "edm_rho", "solver.grid_options": "{'roh': 3}"}, "did you mean 'rho'", None),
    ({"network.multipliers": "2"}, "config.network.multipliers: 2 given; need a list, each a whole number", None),
    ({"network.multipliers": "(1, 1.5)"}, "need a list, each a whole number", None),
    ({"network.name": "mlp", "network.frequencies": "(1,)"}, "(1,) given; need a list of 2, each a number", None),
    ({"process.sigma_min": "[0.1]"}, "config.process.sigma_min: [0.1] given; need a number", None),
    ({"solver.name": "dc_solver", "solver.compensation": "[1, 'a']"}, "need a number or a list of numbers", None),
    (
        {"objective.time": "mode", "objective.time_options": "{'scale': {}}"},
        "['scale']: {} given; need a number",
        None,
    ),
    ({"seed": "-1"}, "config.seed: -1 given; need at least 0", None),
    ({"seed": str(2**32)}, "config.seed: 4294967296 given; need at most 2147483647", None),  # jax takes it for 0
    ({"sample.seed": "-1"}, "config.sample.seed: -1 given", None),
    ({"train.sample_every": "-1"}, "config.train.sample_every: -1 given; need at least 0", None),
    ({"train.nonfinite_limit": "0"}, "config.train.nonfinite_limit: 0 given; need at least 1", None),
    ({"train.keep_every": "-2"}, "config.train.keep_every: -2 given", None),
    ({"optimiser.learning_rate": "1e999"}, "config.optimiser.learning_rate: inf given; need a finite number", None),
    ({"data.in_memory": "{}"}, "config.data.in_memory: {} is unknown; allowed: auto, True, False", None),
]


@pytest.mark.parametrize(("given", "message", "_"), BAD, ids=lambda v: str(v)[:40])
def test_bad_fields_are_one_line(given, message, _):
    with pytest.raises(config_lib.ConfigError) as caught:
        config_lib.check(config_lib.apply_overrides(config_lib.default(), given))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_solvers_take_lists_of_numbers():
    given = {"solver.name": "dc_solver", "solver.compensation": "[1.0, 1.1, 0.9]"}
    config_lib.check(config_lib.apply_overrides(config_lib.default(), given))


def test_missing_file_and_function(tmp_path):
    with pytest.raises(config_lib.ConfigError, match="no file"):
        config_lib.load(str(tmp_path / "none.py"))
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(config_lib.ConfigError, match=r"no get_config"):
        config_lib.load(str(tmp_path / "empty.py"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:\n", r"fails at line 1: SyntaxError: "),
        ("import nothing_of_this_name\n", r"fails at line 1: ModuleNotFoundError: No module named"),
        (
            "from jaxdiff.config import default\ndef get_config():\n    steps = default().solver.steps\n    steps / 0\n",
            r"fails at line 4: ZeroDivisionError: ",
        ),
    ],
)
def test_a_file_that_fails_is_one_line(text, message, tmp_path):
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(config_lib.ConfigError, match=message) as caught:
        config_lib.load(str(tmp_path / "broken.py"))
    assert "\n" not in str(caught.value)


DEFAULT = "from jaxdiff.config import default\ndef get_config():\n    config = default()\n"


@pytest.mark.parametrize(
    ("text", "argument", "message"),
    [
        ("def get_config():\n    pass\n", "", r"get_config\(\) of '.*' returns NoneType; need a ConfigDict"),
        ("get_config = 3\n", "", "defines no get_config"),
        (DEFAULT + "    return config\n", ":moons", r"takes no text, 'moons' given"),
        ("def get_config(size):\n    return size\n", "", r"needs text, none given; FILE.py:TEXT passes TEXT"),
        (b"x = '\xe9'\n", "", r"fails: UnicodeDecodeError"),
        (
            DEFAULT + "    config.data = 'digits'\n    return config\n",
            "",
            r"config.data: 'digits' given; need a section",
        ),
        (
            DEFAULT + "    config.seed = {'a': 1}\n    return config\n",
            "",
            r"config.seed: {'a': 1} given; need a whole",
        ),
        (
            DEFAULT + "    config.network.param_dtype = type\n    return config\n",
            "",
            r"config.network.param_dtype: <class 'type'> \(type\) given; need what JSON can hold",
        ),
    ],
)
def test_a_file_that_gives_no_config_is_one_line(text, argument, message, tmp_path):
    file = tmp_path / "wrong.py"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(config_lib.ConfigError, match=message) as caught:
        config_lib.check(config_lib.load(f"{file}{argument}"))
    assert "\n" not in str(caught.value)


def test_overrides_of_what_is_no_section():
    config = config_lib.default()
    config.data = "digits"
    with pytest.raises(config_lib.ConfigError, match=r"config.data: 'digits' given; need a section"):
        config_lib.apply_overrides(config, {"data.seed": "3"})


@pytest.mark.parametrize("text", ["[]", "null", '{"seed": {"a": 1}}', '{"data": 5}', '{"data": {"name": {"a": 1}}}'])
def test_a_stored_config_that_is_none_is_one_line(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(config_lib.ConfigError) as caught:
        config_lib.check(config_lib.restore(tmp_path / "config.json"))
    assert str(caught.value).startswith("config") and "\n" not in str(caught.value)


def test_store_and_restore(tmp_path):
    config = config_lib.load(str(ROOT / "configs/digits.py"))
    config_lib.store(config, tmp_path / "config.json")
    again = config_lib.restore(tmp_path / "config.json")
    assert json.loads(json.dumps(config.to_dict())) == json.loads(json.dumps(again.to_dict()))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(config_lib.ConfigError, match="cannot read"):
        config_lib.restore(tmp_path / "config.json")


def test_help_imports_no_jax():
    code = (
        "import sys, contextlib, io\n"
        "from jaxdiff.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "    main(['train', '--help'])\n"
        "assert not {'jax', 'flax', 'optax', 'tensorflow_datasets'} & set(sys.modules), 'imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_core_rooms_import_no_extras():
    code = (
        "import sys, jaxdiff as jd\n"
        "jd.process.linear(); jd.prediction.Query; jd.solver.ddim; jd.network.NETWORKS; jd.objective; jd.guidance\n"
        "bad = {'tensorflow_datasets', 'grain', 'ml_collections', 'orbax', 'matplotlib', 'sklearn', 'diffrax'}\n"
        "assert not bad & set(sys.modules), bad & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_process_and_solver_need_no_flax():
    code = (
        "import sys, jaxdiff as jd; jd.process; jd.prediction; jd.solver; jd.exact; assert 'flax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_command_gets_the_nearest_name(capsys):
    with pytest.raises(SystemExit):
        cli.main(["trian", "--config", "none.py"])
    assert "command: 'trian' is unknown; allowed: train, " in (said := capsys.readouterr().err)
    assert said.endswith("did you mean 'train'?\n")


def test_help_lists_every_field():
    text = config_lib.describe("train")
    for path in config_lib.FIELDS:
        assert path in text
