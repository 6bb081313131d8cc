"""A run in several processes: the numbers of one, a clear end where one dies, and a way on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kfac_optax.experiments import processes

ROOT = Path(__file__).parents[2]
STEPS = 8


def start(out, count, **options):
    command = [sys.executable, "-m", "kfac_optax.experiments.processes", f"--processes={count}"]
    options = {"steps": STEPS, "save_every": 2, "out": out} | options
    command += [f"--{name}={value}" for name, value in options.items()]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses of one process without an interruption."""
    return processes.train(tmp_path_factory.mktemp("alone"), steps=STEPS, save_every=STEPS)


def test_a_run_whose_process_is_killed_goes_on_in_another_number_of_processes(alone, tmp_path):
    """Two processes make the first steps, one of them dies; one alone makes the others."""
    done = start(tmp_path, 2, die_at=5)
    assert done.returncode == 1, done.stderr
    assert "process 1 of 2 was killed by signal 9; the others were ended" in done.stderr
    assert "the same command goes on with the last checkpoint" in done.stderr
    assert not (tmp_path / "losses.json").exists()
    rest = processes.train(tmp_path, steps=STEPS, save_every=2)
    assert len(rest) == STEPS - 4  # from the checkpoint of step 4 on
    np.testing.assert_allclose(rest, alone[4:], rtol=1e-4)
    assert alone[-1] < 0.8 * alone[0]


@pytest.mark.slow
def test_four_processes_make_the_numbers_of_one(alone, tmp_path):
    done = start(tmp_path, 4)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "losses.json").read_text())
    assert found["first"] == 0
    np.testing.assert_allclose(found["losses"], alone, rtol=1e-4)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("raise SystemExit(3)", "process 1 of 2 ended with exit code 3; the others were ended"),
        ("import os; os.kill(os.getpid(), 9)", "process 1 of 2 was killed by signal 9; the others"),
    ],
)
def test_where_one_ends_badly_the_others_are_ended(second, message):
    lines = []
    waiting = "import time; time.sleep(1000)"
    commands = [[sys.executable, "-c", code] for code in (waiting, second)]
    assert processes.launch(commands, lines.append) == 1
    assert lines[0].startswith(message)
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--process_id=1"], "--process_id=1 without --coordinator"),
        (["--coordinator=a:1", "--process_id=4"], "--process_id=4 of --processes=4"),
        (["--steps=0"], "--steps=0; expected at least 1"),
    ],
)
def test_words_that_cannot_be_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        processes.main(words)
    assert message in capsys.readouterr().err


def test_where_all_end_well_nothing_is_said():
    lines = []
    assert processes.launch([[sys.executable, "-c", "pass"]] * 2, lines.append) == 0
    assert lines == []
