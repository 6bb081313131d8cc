"""First refresh against the dense formula: the preconditioned and clipped update, to 1e-10 in
double precision.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from tests import oracles

SIZES = (4, 5, 5, 5, 3)
DAMPING, RATE, KAPPA = 0.03, 0.1, 1e-3


@functools.cache
def setup(bias):
    params = oracles.make_params(0, SIZES, bias)
    x = oracles.normal(1, (17, SIZES[0]))
    y = jnp.asarray(np.random.default_rng(2).integers(0, SIZES[-1], 17))
    grads = jax.jit(jax.grad(lambda p: oracles.classifier(p, x).mean_nll(y)))(params)
    logits = jax.jit(lambda p: oracles.forward(p, x)[0])(params)
    a, g = oracles.per_example(params, x, jnp.asarray(oracles.softmax_columns(logits)))
    return params, x, y, grads, a, g


def relative(got, expected):
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


CASES = [(i, c, "identity") for i in ("eigh", "cholesky") for c in (None, "factored", "exact")]
CASES += [("eigh", c, "galerkin") for c in ("factored", "exact")]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inverse", "coarse", "coarse_damping"), CASES)
def test_update_equals_dense_formula(x64, bias, inverse, coarse, coarse_damping):
    params, x, _, grads, a, g = setup(bias)
    estimator = ko.ggn(oracles.classifier)
    layers = estimator.layers(params, x)

    @jax.jit
    def updates(kl_clip):
        common = dict(learning_rate=RATE, damping=DAMPING, kl_clip=kl_clip, inverse=inverse)
        if coarse is None:
            tx = ko.kfac(layers, **common)
        else:
            tx = ko.kfac_two_level(layers, coarse=coarse, coarse_damping=coarse_damping, **common)
        return tx.update(
            grads, tx.init(params), params, curvature=estimator.at(params, x), refresh=True
        )[0]

    sizes, gradient = oracles.block_sizes(a, g), oracles.flatten(grads)
    if inverse == "eigh":
        fine = oracles.block_diagonal(oracles.kronecker_fisher(a, g), sizes) + DAMPING * np.eye(
            sum(sizes)
        )
    else:
        fine = oracles.factored_tikhonov(a, g, DAMPING)
    if coarse is None:
        expected = np.linalg.solve(fine, gradient)
    else:
        whole = (
            oracles.kronecker_fisher(a, g) if coarse == "factored" else oracles.exact_fisher(a, g)
        )
        z = oracles.restriction(sizes)
        diagonal = DAMPING * np.array(sizes) if coarse_damping == "galerkin" else None
        expected = oracles.two_level(fine, z @ whole @ z.T, z, gradient, DAMPING, diagonal)
    assert relative(oracles.flatten(updates(1e9)), expected) < 1e-10
    clipped = oracles.clip(expected, gradient, sizes, RATE, KAPPA)
    assert np.linalg.norm(clipped) < 0.9 * np.linalg.norm(expected), "the case should be clipped"
    assert relative(oracles.flatten(updates(KAPPA)), clipped) < 1e-10


@pytest.mark.parametrize("coarse", ["factored", "exact"])
def test_sampled_labels_give_the_dense_formula(x64, coarse):
    """Same labels in both: the empirical Fisher at given labels, and `fisher` with a likelihood
    that draws them.
    """
    params, x, y, grads, _, _ = setup(True)
    onehot = jax.nn.one_hot(y, SIZES[-1])
    seeds = jax.jit(lambda: jax.nn.softmax(oracles.forward(params, x)[0]) - onehot)()
    a, g = oracles.per_example(params, x, seeds[None])

    class Fixed:  # a likelihood by its methods only; draws the labels above
        def __init__(self, inner):
            self.inner = inner
            self.batch_shape, self.weights, self.num_columns = (
                inner.batch_shape,
                None,
                inner.num_columns,
            )
            self.natural, self.hessian_product = inner.natural, inner.hessian_product
            self.fisher_sqrt_column, self.nll, self.mean_nll = (
                inner.fisher_sqrt_column,
                inner.nll,
                inner.mean_nll,
            )

        def with_natural(self, natural):
            return Fixed(self.inner.with_natural(natural))

        def sample(self, key):
            return y

    jax.tree_util.register_pytree_node(Fixed, lambda f: ((f.inner,), None), lambda _, c: Fixed(*c))
    for estimator, args in [
        (ko.empirical_fisher(lambda p, x, y: oracles.classifier(p, x).nll(y)), (x, y)),
        (ko.fisher(lambda p, x: Fixed(oracles.classifier(p, x))), (x,)),
        (ko.fisher(lambda p, x: Fixed(oracles.classifier(p, x)), samples=3), (x,)),
    ]:
        layers = estimator.layers(params, *args)
        tx = ko.kfac_two_level(layers, learning_rate=RATE, damping=DAMPING, coarse=coarse)
        curvature = estimator.at(params, *args, key=jax.random.key(0))
        updates, _ = jax.jit(tx.update)(grads, tx.init(params), params, curvature=curvature)
        sizes, gradient = oracles.block_sizes(a, g), oracles.flatten(grads)
        surrogate = oracles.kronecker_fisher(a, g)
        fine = oracles.block_diagonal(surrogate, sizes) + DAMPING * np.eye(sum(sizes))
        z = oracles.restriction(sizes)
        whole = surrogate if coarse == "factored" else oracles.exact_fisher(a, g)
        expected = oracles.two_level(fine, z @ whole @ z.T, z, gradient, DAMPING)
        expected = oracles.clip(expected, gradient, sizes, RATE, KAPPA)
        assert relative(oracles.flatten(updates), expected) < 1e-10


def test_coarse_weight_zero_is_kfac_and_weights_enter_linearly(x64):
    params, x, _, grads, _, _ = setup(True)
    estimator = ko.ggn(oracles.classifier)
    layers, curvature = estimator.layers(params, x), estimator.at(params, x)

    def update(tx):
        return jax.jit(tx.update)(grads, tx.init(params), params, curvature=curvature)[0]

    one = update(ko.kfac(layers, learning_rate=RATE, kl_clip=None))
    off = update(ko.kfac_two_level(layers, learning_rate=RATE, kl_clip=None, coarse_weight=0.0))
    for u, v in zip(jax.tree.leaves(one), jax.tree.leaves(off)):
        np.testing.assert_array_equal(u, v)
    coarse = update(ko.kfac_two_level(layers, learning_rate=RATE, kl_clip=None, fine_weight=0.0))
    mixed = update(
        ko.kfac_two_level(
            layers, learning_rate=RATE, kl_clip=None, fine_weight=0.5, coarse_weight=2.0
        )
    )
    expected = optax.tree.add(optax.tree.scale(0.5, one), optax.tree.scale(2.0, coarse))
    assert relative(oracles.flatten(mixed), oracles.flatten(expected)) < 1e-12
    for layer in coarse.values():  # the same shift on every weight and bias of a layer
        values = np.concatenate([np.ravel(x) for x in layer.values()])
        np.testing.assert_allclose(values, values[0], rtol=1e-12)


def test_operator_is_symmetric_positive_definite(x64):
    """Additive two-level preconditioning applied to the identity; also linearity in the gradient."""
    params = oracles.make_params(0, (2, 3, 2))
    x = oracles.normal(1, (9, 2))
    estimator = ko.ggn(oracles.classifier)
    tx = ko.kfac_two_level(
        estimator.layers(params, x), learning_rate=1.0, kl_clip=None, damping=0.1
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    _, state = jax.jit(tx.update)(zeros, tx.init(params), params, curvature=estimator.at(params, x))
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    step = jax.jit(
        lambda v: jax.flatten_util.ravel_pytree(
            tx.update(unravel(v), state, curvature=None, refresh=False)[0]
        )[0]
    )
    dense = np.stack([step(e) for e in np.eye(flat.size)])
    np.testing.assert_allclose(dense, dense.T, atol=1e-12)
    assert np.linalg.eigvalsh(dense).min() > 0
    v = oracles.normal(5, flat.shape)
    np.testing.assert_allclose(step(v), dense @ v, rtol=1e-10)


def test_large_damping_turns_into_the_gradient(x64):
    params, x, _, grads, _, _ = setup(True)
    estimator = ko.ggn(oracles.classifier)
    lam = 1e8
    tx = ko.kfac(estimator.layers(params, x), learning_rate=RATE, kl_clip=None, damping=lam)
    updates, _ = jax.jit(tx.update)(
        grads, tx.init(params), params, curvature=estimator.at(params, x)
    )
    assert relative(lam * oracles.flatten(updates), oracles.flatten(grads)) < 1e-6
