"""The README's Python runs, top to bottom, as one program."""

import pathlib
import re

README = pathlib.Path(__file__).resolve().parent.parent / "README.md"


def test_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(blocks) == 2
    names: dict = {}
    exec("\n".join(blocks), names)
    assert names["x"].shape == (64, 2)
    assert names["sweep"].shape == (6, 64, 2)
    assert names["jnp"].isfinite(names["sweep"]).all()


def test_commands_exist():
    from jaxdiff import cli, config

    text = README.read_text()
    for name in re.findall(r"^jaxdiff (\w+)", text, re.M):
        assert name in cli.EXAMPLES
    for field in re.findall(r"--config\.([\w.]+)=", text):
        assert field in config.FIELDS


def test_rooms_exist():
    import jaxdiff

    root = pathlib.Path(jaxdiff.__file__).parent
    rooms = re.findall(r"^\| `(\w+(?:/|\.py))`", README.read_text(), re.M)
    assert len(rooms) > 10
    for name in rooms:
        assert (root / name).exists(), name


def test_sources_of_docstrings_are_listed():
    root = README.parent
    text = "".join(path.read_text() for path in (root / "jaxdiff").rglob("*.py"))
    cited = {(number, paper) for paper, number in re.findall(r"(\d{4}\.\d{4,5}) \[(\d+)\]", text)}
    listed = set(re.findall(r"^\| (\d+) \| ([\d.]+) \|", (root / "docs" / "sources.md").read_text(), re.M))
    assert len(cited) > 20 and cited <= listed, cited - listed
