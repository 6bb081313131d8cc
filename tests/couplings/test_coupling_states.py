"""Every coupling on the traced schedule: the state keeps its types, what is skipped, shares, table,
inspection.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from kfac_optax._tree import tree_bytes
from tests import helpers, oracles

COUPLINGS = {
    "additive": ko.coarse_correction(),
    "a-def2": ko.deflated(),
    "bnn": ko.deflated("bnn", coarse_operator="averaged", coarse="exact"),
    "tridiagonal": ko.tridiagonal(),
}
BLOCK = ko.kronecker("cholesky")
SIZES = (2, 3, 3)


ESTIMATOR = ko.fisher(oracles.classifier, samples=2)


@functools.cache
def problem():
    params = jax.tree.map(lambda v: v.astype(jnp.float32), oracles.make_params(0, SIZES))
    return (
        params,
        oracles.normal(1, (6, 2)).astype(jnp.float32),
        ESTIMATOR.layers(params, jnp.ones((6, 2))),
    )


@pytest.mark.parametrize("name", COUPLINGS)
def test_schedule_state_and_inspection(name):
    params, x, layers = problem()
    curvature = ko.scale_by_curvature(
        layers,
        block=BLOCK,
        coupling=COUPLINGS[name],
        damping=0.1,
        curvature_every=2,
        inverse_every=2,
    )
    tx = optax.chain(curvature, optax.sgd(0.1, momentum=0.9))

    @functools.partial(helpers.counted_jit, donate_argnums=(0, 1))
    def step(params, state, key, bad):
        grads = jax.grad(lambda p: oracles.classifier(p, x).mean_nll(jnp.zeros(6, int)))(params)
        at = ESTIMATOR.at(params, jnp.where(bad, jnp.nan, x), key=key)
        updates, new = tx.update(grads, state, params, curvature=at)
        return optax.apply_updates(params, updates), new, state[0].coarse

    params, state = jax.tree.map(jnp.array, params), tx.init(params)
    types, kept = jax.tree.map(jax.typeof, state), []
    for i in range(4):
        params, state, before = step(params, state, jax.random.key(i), False)
        kept.append((before, jax.tree.map(np.asarray, state[0].coarse)))
    assert step.traces == 1
    assert jax.tree.map(jax.typeof, state) == types
    same = [all(jax.tree.leaves(jax.tree.map(np.array_equal, *pair))) for pair in kept]
    assert same == [False, True, False, True]  # statistics and inverses are due every other step

    scalars = ko.diagnostics(state)
    assert 0 < float(scalars["coarse_share"]) < 2
    assert int(scalars["statistics"]) == 2 and int(scalars["failed_inverses"]) == 0
    _, spoiled, before = step(params, state, jax.random.key(4), True)
    assert int(ko.diagnostics(spoiled)["skipped_statistics"]) == 1
    jax.tree.map(
        np.testing.assert_array_equal, spoiled[0].coarse.coarse_factors, before.coarse_factors
    )
    if name != "tridiagonal":
        matrix, rows = ko.coarse_fisher(spoiled)
        assert matrix.shape == (2, 2) and rows == ("layer0", "layer1")


@pytest.mark.parametrize("name", COUPLINGS)
def test_static_refresh_is_the_traced_schedule_and_the_table_adds_up(name):
    params, x, layers = problem()
    tx = ko.scale_by_curvature(layers, block=BLOCK, coupling=COUPLINGS[name], damping=0.1)
    state = tx.init(params)
    at = ESTIMATOR.at(params, x, key=jax.random.key(0))

    @jax.jit
    def both():
        return [
            tx.update(params, state, params, curvature=at, refresh=refresh)
            for refresh in (None, True)
        ]

    traced, static = both()
    jax.tree.map(
        lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-4, atol=1e-5), traced, static
    )
    table = ko.coverage(layers, block=BLOCK, coupling=COUPLINGS[name])
    assert table.coupling_bytes == tree_bytes(state.coarse)
    assert sum(table.state_bytes) == tree_bytes((state.factors, state.inverses))
    assert COUPLINGS[name].name in str(table)


def test_couplings_see_only_the_layers_that_are_theirs():
    """Under `optax.masked` the products leave out the rest of the model, and a chain closes over a
    missing link.
    """
    params, x, layers = problem()
    at = ESTIMATOR.at(params, x, key=jax.random.key(0))
    mask = {"layer0": {"kernel": False, "bias": False}, "layer1": {"kernel": True, "bias": True}}

    @jax.jit
    def updates():
        result = []
        for coupling in (ko.deflated(), ko.tridiagonal(), None):
            tx = optax.masked(
                ko.scale_by_curvature(layers, block=BLOCK, coupling=coupling, damping=0.1), mask
            )
            result.append(tx.update(params, tx.init(params), params, curvature=at)[0])
        return result

    deflated, tridiagonal, alone = updates()
    for result in (deflated, tridiagonal):
        jax.tree.map(np.testing.assert_array_equal, result["layer0"], params["layer0"])
    jax.tree.map(np.testing.assert_array_equal, tridiagonal, alone)  # a chain of one
    change = jax.tree.map(jnp.subtract, deflated["layer1"], alone["layer1"])
    np.testing.assert_allclose(
        change["kernel"], change["bias"][0] * np.ones((3, 3)), rtol=1e-3, atol=1e-5
    )
