"""The ground state of lithium by variational Monte Carlo: K-FAC against Adam on a small FermiNet.

As `helium`, with a determinant of two electrons of one spin. Damping and KL-clip were chosen in runs
of 300 steps with 256 walkers: ten times those of helium, with which K-FAC is behind Adam here. Not
more than that has been tuned.
"""

import importlib.util
from pathlib import Path

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the settings of the experiment."""
    config = _helium()
    config.name, config.title = "lithium", "lithium, 512 walkers"
    config.atom = {"charge": 3, "up": 2, "down": 1}
    config.exact = -7.478060  # hartree
    config.kfac.damping = 1e-2
    config.kfac.kl_clip = 1e-2
    return config


def _helium() -> ml_collections.ConfigDict:
    spec = importlib.util.spec_from_file_location("helium", Path(__file__).with_name("helium.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()
