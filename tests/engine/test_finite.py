"""One number that is not finite is seen among many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax._tree import all_finite
from tests import helpers as h


@pytest.mark.parametrize("shape", [(7,), (80, 80)])
def test_a_number_that_is_not_finite_is_seen_wherever_it_is(shape):
    """In the maximum of a large array XLA loses NaN on a CPU."""
    check = jax.jit(lambda x: all_finite({"x": x, "count": jnp.int32(1)}))
    size = np.prod(shape)
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        for place in (0, size // 3, size - 1):
            x = np.ones(size, np.float32)
            x[place] = value
            assert not check(x.reshape(shape))
    # the largest and the smallest numbers there are, and none
    for value in (3.4e38, -3.4e38, 1e-45, 0.0):
        assert check(np.full(shape, value, np.float32))
    assert all_finite({}) and all_finite(jnp.zeros((0,)))


def test_a_bad_feature_of_a_wide_layer_spoils_no_statistics():
    w, x = jnp.ones((80, 2)), jnp.ones((4, 80))
    estimator = ko.forward_only(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    tx = ko.scale_by_curvature(estimator.layers(w, x), block=ko.kronecker("cholesky"))
    step = jax.jit(lambda s, x: tx.update(w, s, w, curvature=estimator.at(w, x), refresh=False)[1])
    good = step(tx.init(w), x)
    # one row and one column of A are NaN, and nothing else
    bad = step(good, x.at[2, 1].set(jnp.nan))
    assert int(bad.skipped_statistics) == 1
    h.assert_leaves_close(bad.factors, good.factors)
