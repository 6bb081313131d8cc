"""Data parallel on eight CPU devices; the checks are in `device_checks.py` and other files
beside it, in processes of their own.
"""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.compat.device_checks import CHECKS
from tests.compat.local_statistics_checks import CHECKS as OF_LOCAL_STATISTICS
from tests.compat.local_statistics_checks import SLOW as OF_LOCAL_STATISTICS_SLOW
from tests.compat.model_parallel_checks import CHECKS as OF_PARAMETERS
from tests.compat.own_gradient_checks import CHECKS as OF_OWN_GRADIENTS
from tests.compat.placement_checks import CHECKS as OF_PLACEMENT
from tests.compat.placement_checks import SLOW as OF_PLACEMENT_SLOW
from tests.compat.wide_layer_checks import CHECKS as OF_WIDE_LAYERS

ROOT = pathlib.Path(__file__).parents[2]
NAMES = list(CHECKS)
# the checks of a group share a start of JAX
GROUPS = [
    NAMES[:5],
    NAMES[5:10],
    NAMES[10:12],
    NAMES[12:],
    [*OF_PLACEMENT][:4],
    [*OF_PLACEMENT][4:],
    [*OF_PARAMETERS, *OF_OWN_GRADIENTS, "catalogue"],
    [*OF_LOCAL_STATISTICS],
    ["presets"],
    pytest.param([*OF_PLACEMENT_SLOW, *OF_LOCAL_STATISTICS_SLOW], marks=pytest.mark.slow),
    pytest.param(["catalogue_everywhere"], marks=pytest.mark.slow),
    pytest.param(["other_presets"], marks=pytest.mark.slow),
]


# the environment of tests takes threads from XLA; users have them
WITHOUT_THREADS = "--xla_cpu_multi_thread_eigen=false"


@pytest.mark.parametrize("names", GROUPS, ids="+".join)
def test_on_eight_devices(names):
    _run(names, os.environ)


def test_on_eight_devices_with_threads():
    """A step that waits for threads for ever runs into the time limit."""
    flags = os.environ["XLA_FLAGS"].replace(WITHOUT_THREADS, "")
    _run([*OF_WIDE_LAYERS], os.environ | {"XLA_FLAGS": flags}, timeout=120)


def _run(names, environment, timeout=300):
    done = subprocess.run(
        [sys.executable, "-m", "tests.compat.device_checks", *names],
        cwd=ROOT,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    passed = [
        line.removeprefix("passed ")
        for line in done.stdout.splitlines()
        if line.startswith("passed ")
    ]
    assert passed == names, done.stdout + done.stderr
    assert done.returncode == 0
