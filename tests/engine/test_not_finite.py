"""One number that is not finite among many is seen, whatever the backend makes of a maximum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax._tree import all_finite
from tests import helpers as h

WIDE = 72  # XLA's CPU backend reduces larger arrays by other code, which may lose a NaN

check = jax.jit(all_finite)
check_each = jax.jit(jax.vmap(all_finite))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_entry_among_many(value):
    # their sums overflow
    good = np.full((3, WIDE, WIDE), np.finfo("f").max, "f")
    good[1] *= -1
    count = np.arange(3)
    assert check((good, count))
    for place in ((0, 0, 0), (1, 5, 5), (2, -1, -1), (2, 40, 7)):
        bad = good.copy()
        bad[place] = value
        assert not check((bad, count))
        expected = np.arange(3) != place[0]
        np.testing.assert_array_equal(check_each(bad), expected)


def test_trees_without_numbers_that_could_be_bad():
    assert check(()) and check({"count": jnp.arange(3), "flag": jnp.array(True)})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_statistics_of_which_a_part_is_not_finite_are_left_out(value):
    """The model hides what is wrong with an input, so that one row and column of `A` is bad."""

    def predict(w, x):
        z = h.dense(x, w)
        return ko.Categorical(jnp.where(jnp.isfinite(z), z, 0))

    estimator = ko.fisher(predict)
    w, x = jnp.full((WIDE, WIDE), 0.1), jnp.ones((8, WIDE))
    layers = estimator.layers(w, x)
    tx = ko.scale_by_curvature(layers, block=ko.kronecker("cholesky"), curvature_every=1)

    @jax.jit
    def step(state, x):
        at = estimator.at(w, x, key=jax.random.key(0))
        return tx.update(w, state, w, curvature=at)[1]

    good = step(tx.init(w), x)
    state = step(good, x.at[2, 40].set(value))
    assert int(state.skipped_statistics) == 1
    h.assert_leaves_close(state.factors, good.factors)
