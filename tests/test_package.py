"""The package as users meet it: README, public names, typing marker."""

import importlib.resources
import pathlib
import re

import kfac_optax as ko

ROOT = pathlib.Path(__file__).parent.parent


def test_readme_runs_from_top_to_bottom(capsys):
    text = (ROOT / "README.md").read_text()
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "loss below 0.1: True" in printed
    (table,) = re.findall(r"```text\n(layer .*?)```", text, re.DOTALL)
    assert table.strip() in printed


def test_every_public_name_is_documented_with_an_example():
    for name in ko.__all__:
        thing = getattr(ko, name)
        assert thing.__doc__, name
        if callable(thing) and name[0].islower():
            assert ">>>" in thing.__doc__, name
    assert sorted(ko.__all__, key=str.lower) == sorted(set(ko.__all__), key=str.lower)


def test_typing_marker_is_shipped():
    assert importlib.resources.files(ko).joinpath("py.typed").is_file()
