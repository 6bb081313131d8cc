"""Data parallel on eight CPU devices; the checks are in `device_checks.py`, each in a process of its own."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.compat.device_checks import CHECKS

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("name", CHECKS)
def test_on_eight_devices(name):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compat.device_checks", name],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"passed {name}" in done.stdout
