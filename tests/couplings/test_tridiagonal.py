"""The block-tridiagonal inverse as a dense operator, its statistics, and what does not fit."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from tests import oracles
from tests.couplings.mixed_net import CHAIN, ESTIMATOR, SETTINGS, net, operator, positions

DAMPING = 0.05
KFAC = functools.partial(ko.kfac, inverse="cholesky", **SETTINGS | {"damping": DAMPING})


def dense_problem(sizes):
    """Update operator in canonical order, and the damped Kronecker surrogate of the whole Fisher."""
    params, x = oracles.make_params(0, sizes), oracles.normal(1, (7, sizes[0]))
    logits = jax.jit(lambda p: oracles.forward(p, x)[0])(params)
    a, g = oracles.per_example(params, x, jnp.asarray(oracles.softmax_columns(logits)))
    estimator = ko.ggn(oracles.classifier)
    layers = estimator.layers(params, x)
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    @jax.jit
    def run():
        tx = KFAC(layers, coupling=ko.tridiagonal())
        _, state = tx.update(
            params, tx.init(params), curvature=estimator.at(params, x), refresh=True
        )
        update = lambda v: tx.update(unravel(v), state, curvature=None, refresh=False)[0]
        return jax.vmap(lambda v: jax.flatten_util.ravel_pytree(update(v))[0], out_axes=1)(
            jnp.eye(flat.size)
        )

    order = oracles.flatten(unravel(jnp.arange(flat.size))).astype(int)
    blocks = oracles.block_sizes(a, g)
    surrogate = oracles.kronecker_fisher(a, g)
    surrogate += oracles.factored_tikhonov(a, g, DAMPING) - oracles.block_diagonal(
        surrogate, blocks
    )
    return np.asarray(run())[order][:, order], surrogate, np.cumsum([0, *blocks])


@pytest.mark.parametrize(
    "sizes", [(2, 3, 3, 3, 3, 2), (3, 2), (2, 3, 2)], ids=["five", "one", "two"]
)
def test_inverse_of_the_update_matches_the_surrogate_on_three_diagonals(x64, sizes):
    """Links of equal and of other shapes. One layer is block-diagonal, two are the whole
    surrogate's inverse.
    """
    inverse, surrogate, starts = dense_problem(sizes)
    parts = [slice(a, b) for a, b in itertools.pairwise(starts)]
    got = np.linalg.inv(inverse)
    for i, rows in enumerate(parts):
        for j, columns in enumerate(parts):
            if abs(i - j) <= 1:
                assert (
                    np.abs(got[rows, columns] - surrogate[rows, columns]).max()
                    < 1e-10 * np.abs(surrogate).max()
                )
            else:
                assert not inverse[rows, columns].any()
                assert np.abs(surrogate[rows, columns]).max() > 1e-3
    assert np.abs(inverse - inverse.T).max() < 1e-12 * np.abs(inverse).max()
    assert np.linalg.eigvalsh(inverse).min() > 0


def test_layers_between_stay_block_diagonal(x64):
    """A normalisation between the first two layers; buckets out of order; what no block covers
    passes through.
    """
    problem = net()
    coupled = np.asarray(
        jax.jit(lambda: operator(KFAC(problem.layers, coupling=ko.tridiagonal()), problem))()
    )
    alone = np.asarray(jax.jit(lambda: operator(KFAC(problem.layers), problem))())
    other = np.concatenate([positions(name) for name in ("scale", "shift", "gain")])
    np.testing.assert_array_equal(coupled[other], alone[other])
    np.testing.assert_array_equal(coupled[:, other], alone[:, other])
    last = np.concatenate([positions(name) for name in ("w3", "b3")])
    assert np.abs(coupled[np.ix_(positions(CHAIN[2]), last)]).max() > 1e-3
    assert not coupled[np.ix_(positions(CHAIN[1]), last)].any()
    # the layer that nothing is regressed on has the inverse of its own block's Schur complement, so
    # more than alone
    assert (
        np.linalg.eigvalsh(coupled[np.ix_(last, last)] - alone[np.ix_(last, last)]).min() > -1e-12
    )
    assert np.linalg.eigvalsh(coupled).min() > 0


def cross(estimator, params, *args, key=None):
    plan = oracles.plan(
        estimator.layers(params, *args), ko.tridiagonal(), block=ko.kronecker("cholesky")
    )
    factors, across = jax.jit(lambda p, args: estimator.at(p, *args, key=key).statistics(plan))(
        params, args
    )
    return factors, across


def test_weights_count_examples(x64):
    """Weights `0, 1, 2, ..` are repetitions; the mean over samples has the scale of one."""
    params, x = oracles.make_params(0, (2, 3, 2)), oracles.normal(1, (5, 2))
    weights = jnp.asarray([0, 1, 2, 0, 1])
    repeated = jnp.repeat(x, weights, axis=0)
    got = cross(ko.ggn(oracles.classifier), params, x.at[0].set(1e6), weights.astype(float))
    expected = cross(ko.ggn(oracles.classifier), params, repeated)
    for u, v in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(u, v, rtol=1e-10, atol=1e-14)
    sampled = cross(
        ko.fisher(oracles.classifier, samples=3), params, repeated, key=jax.random.key(0)
    )
    for factors, across in (expected, sampled):
        for mine, link in zip(("inputs", "outputs"), across, strict=True):
            (block,) = link.values()
            first, last = (getattr(f, mine)[0] for f in factors)
            joint = np.block([[first, block[0]], [block[0].T, last]])
            # consistent moments, whatever the estimator
            assert np.linalg.eigvalsh(joint).min() > -1e-12
            assert np.abs(block).max() > 1e-3


def test_cross_factors_are_averaged_like_the_factors(x64):
    """Two batches one after another are the mean of both: same count, same weight."""
    params, x = oracles.make_params(0, (2, 3, 2)), oracles.normal(1, (10, 2))
    estimator = ko.ggn(oracles.classifier)
    tx = KFAC(estimator.layers(params, x), coupling=ko.tridiagonal())
    step = jax.jit(
        lambda s, x: tx.update(params, s, curvature=estimator.at(params, x), refresh=False)[1]
    )
    state = step(step(tx.init(params), x[:5]), x[5:]).preconditioner
    factors, across = cross(estimator, params, x)
    got = [*state.factors.values(), state.coarse.coarse_factors]
    for u, v in zip(jax.tree.leaves(got), jax.tree.leaves([*factors, across]), strict=True):
        np.testing.assert_allclose(u, v, rtol=1e-10, atol=1e-14)


class Model(nn.Module):
    how: str

    @nn.compact
    def __call__(self, x):
        if self.how == "conv":
            return nn.Conv(2, (2,), name="wide")(x[..., None]).sum(1)
        if self.how == "stack":
            return nn.scan(
                _Cell, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )(name="s")(x, None)[0]
        if self.how == "norm":
            return nn.LayerNorm()(x)
        layer = nn.Dense(x.shape[-1], name="wide")
        if self.how == "twice":
            return layer(jnp.tanh(layer(x)))
        return layer(x[:, None] * jnp.ones((1, 3, 1))).sum(1)


class _Cell(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(2, name="wide")(x), None


WRONG = {
    "twice": r"tridiagonal: layer 'wide' runs 2 times; expected dense layers",
    "conv": r"tridiagonal: layer 'wide' is of kind 'conv'; expected dense layers",
    "stack": r"tridiagonal: layer 's/wide' is a stack of 2; expected dense layers",
    "norm": r"tridiagonal: no layer with weights between units; expected dense layers",
    "positions": r"block-tridiagonal: layer 'wide' has rows \(4, 3\); expected one row per example, \(4,\)",
}


@pytest.mark.parametrize("how", WRONG)
def test_layers_that_do_not_fit_are_named(how):
    model, x = Model(how), jnp.ones((4, 2))
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    estimator = ko.ggn(lambda p, x: ko.Normal(model.apply({"params": p}, x)))
    layers = estimator.layers(params, x)

    def step(params):
        tx = KFAC(layers, coupling=ko.tridiagonal())
        return tx.update(params, tx.init(params), curvature=estimator.at(params, x))

    with pytest.raises(ValueError, match=WRONG[how]):
        jax.eval_shape(step, params)


def test_settings_that_do_not_fit_are_named(x64):
    layers = net().layers
    with pytest.raises(
        ValueError,
        match=r"layer '.*' has the block 'kronecker \(eigh\)'; .*kfac\(..., inverse='cholesky'",
    ):
        ko.kfac(layers, learning_rate=0.1, coupling=ko.tridiagonal())
    with pytest.raises(ValueError, match=r"has the block 'kronecker \(eigh\)'"):
        ko.coverage(layers, coupling=ko.tridiagonal())
    tx, params = KFAC(layers, coupling=ko.tridiagonal()), net().params
    inputs_only = ko.forward_only(lambda p, x: ESTIMATOR.spec.function(p, x))
    with pytest.raises(
        ValueError, match="tridiagonal: this estimator measures no output gradients"
    ):
        jax.eval_shape(
            lambda p: tx.update(p, tx.init(p), curvature=inputs_only.at(p, net().x)), params
        )
    state = jax.eval_shape(tx.init, params)
    with pytest.raises(
        ValueError, match="coarse_fisher: this coupling keeps CrossFactors, no coarse matrix"
    ):
        ko.coarse_fisher(state)
