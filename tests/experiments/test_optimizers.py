"""The compared optimizers take the options of a configuration."""

import jax
import ml_collections
import pytest

from kfac_optax.experiments.optimizers import OPTIMIZERS, Curved
from tests import helpers

CONFIG = ml_collections.ConfigDict({"weight_decay": 0.0, "momentum": 0.9})
OPTIONS = dict(damping=1e-2, kl_clip=1e-3, curvature_every=5, inverse_every=20, inverse="eigh")


@pytest.mark.parametrize("name", ["eva_s", "ekfac", "tkfac", "tekfac", "kpsvd", "kpsvd_two"])
def test_built_of_a_configuration(name):
    problem = helpers.plain_problem()
    optimizer = OPTIMIZERS[name]
    curved = Curved(problem.layers, OPTIONS) if optimizer.curvature else None
    state = jax.eval_shape(optimizer.build(CONFIG, curved, 0.1).init, problem.params)
    assert jax.tree.leaves(state)
