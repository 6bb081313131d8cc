"""Statistics of axes whose product is nearest to the second moment, in Shampoo and in SOAP."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from kfac_optax.methods.gradient import axes
from kfac_optax.methods.gradient.kl_statistics import kl_averaged_in
from tests import helpers as h
from tests.methods import gradient_cases as c

EXACT = dict(statistics="kl", decay=0.9, ridge=0.0, inverse_every=1, merge=1)
RULES = axes.Rules(max_dim=64, merge=1, long_axes="split", vectors="full", stacked=None)


def inverse_root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * values**-0.5) @ vectors.T


def group_of(*shape):
    return axes.make_groups("here", {"w": jnp.zeros(shape)}, RULES)[0]


def contributions(shape, samples, factors):
    """Mean over samples of what they add to the factors, none of them so large that it is cut."""
    group, small = group_of(*shape), 1e-6

    def one(sample):
        zeros = jax.tree.map(jnp.zeros_like, factors)
        whiteners = {i: jax.vmap(axis_root)(x) for i, x in factors.items()}
        weights = (jnp.float64(0), jnp.float64(small))
        return kl_averaged_in(group, sample[None], zeros, weights, whiteners)

    return jax.tree.map(lambda x: x.mean(0) / small, jax.vmap(one)(samples))


def axis_root(matrix):
    values, vectors = jnp.linalg.eigh(matrix)
    return (vectors * values**-0.5) @ vectors.T


def fixed_point(shape, samples):
    """Where the factors stay as they are, by averaging."""
    begin = {str(i): jnp.eye(n)[None] for i, n in enumerate(shape)}

    def step(_, factors):
        new = contributions(shape, samples, factors)
        return jax.tree.map(lambda x, y: (x + y) / 2, factors, new)

    return jax.jit(lambda: jax.lax.fori_loop(0, 200, step, begin))()


def equal_sizes(left, right):
    """The same product of factors with equal mean diagonal entries."""
    ratio = math.sqrt(np.mean(np.diag(right)) / np.mean(np.diag(left)))
    return ratio * left, right / ratio


def product(factors):
    dense = np.ones((1, 1))
    for factor in factors.values():
        dense = np.kron(dense, np.asarray(factor[0]))
    return dense


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2)])
def test_factors_of_a_kronecker_product_are_found(x64, shape):
    """Of gradients whose second moment is exactly `A (x) B (x) ...`."""
    rng, size = np.random.default_rng(0), math.prod(shape)
    roots = [np.tril(rng.normal(size=(n, n))) + 2 * np.eye(n) for n in shape]
    dense_root = np.ones((1, 1))
    for root in roots:
        dense_root = np.kron(dense_root, root)
    # one sample for every column of the root of the covariance
    samples = jnp.asarray(math.sqrt(size) * dense_root.T.reshape(size, *shape))
    found = fixed_point(shape, samples)
    np.testing.assert_allclose(product(found), dense_root @ dense_root.T, rtol=1e-8, atol=1e-9)
    for i, root in enumerate(roots):
        # each up to a factor
        ratio = np.asarray(found[str(i)][0]) / (root @ root.T)
        np.testing.assert_allclose(ratio, np.full_like(ratio, ratio[0, 0]), rtol=1e-7)


def test_the_divergence_is_stationary(x64):
    """Of any gradients: its derivative by every factor vanishes, and it is less elsewhere."""
    shape = (3, 4)
    samples = jnp.asarray(np.random.default_rng(1).normal(size=(20, 12)) @ np.diag(range(1, 13)))
    second = samples.T @ samples / 20

    def divergence(factors):
        dense = jnp.kron(factors["0"][0], factors["1"][0])
        return jnp.linalg.slogdet(dense)[1] + jnp.trace(jnp.linalg.solve(dense, second))

    found = fixed_point(shape, samples.reshape(20, *shape))
    derivative = jax.grad(divergence)(found)
    for leaf in jax.tree.leaves(derivative):
        np.testing.assert_allclose(leaf, np.zeros_like(leaf), atol=1e-7)
    # Shampoo's product, with its best factor, is farther away
    tensors = samples.reshape(20, *shape)
    outer = {
        "0": jnp.einsum("zij,zkj->ik", tensors, tensors)[None],
        "1": jnp.einsum("zij,zik->jk", tensors, tensors)[None],
    }
    scale = jnp.trace(jnp.linalg.solve(jnp.kron(outer["0"][0], outer["1"][0]), second)) / 12
    outer["0"] = outer["0"] * scale
    assert divergence(found) < divergence(outer) - 0.1


def test_steps_written_out(x64):
    """`L <- e L + (1 - e) share G R^(-1) G^T / q`, from `sqrt(s) I` on, and `L^(-1/2) G R^(-1/2)`."""
    gradients = c.draws(2, 3, 3, steps=6)
    updates, state = c.run(ko.scale_by_shampoo(**EXACT), gradients)
    left = right = None
    w_left = w_right = np.mean(gradients[0] ** 2) ** -0.25 * np.eye(3)
    for t, g in enumerate(gradients, start=1):
        e = min(1 - 1 / t, 0.9)
        share = min(1, 1 / ((1 - e) * np.mean((w_left @ g @ w_right) ** 2)))
        new_left = share * g @ w_right @ w_right @ g.T / 3
        new_right = share * g.T @ w_left @ w_left @ g / 3
        left = new_left if left is None else e * left + (1 - e) * new_left
        right = new_right if right is None else e * right + (1 - e) * new_right
        w_left, w_right = inverse_root(left), inverse_root(right)
        u = w_left @ g @ w_right
        u *= min(1, math.sqrt(9 / (1 - e)) / np.linalg.norm(u))
        np.testing.assert_allclose(updates[t - 1], u, rtol=1e-6)
    for i, expected in enumerate(equal_sizes(left, right)):
        np.testing.assert_allclose(state.factors["3x3"][str(i)][0], expected, rtol=1e-7)


def test_bases_of_soap_are_those_of_these_statistics(x64):
    gradients = c.draws(3, 3, 3, steps=4)
    tx = ko.scale_by_soap(statistics="kl", decay=0.9, inverse_every=1, basis="eigh")
    _, state = c.run(tx, gradients)
    statistics, roots = None, [np.mean(gradients[0] ** 2) ** -0.25 * np.eye(3)] * 2
    for t, g in enumerate(gradients, start=1):
        e = min(1 - 1 / t, 0.9)
        share = min(1, 1 / ((1 - e) * np.mean((roots[0] @ g @ roots[1].T) ** 2)))
        half_left, half_right = g @ roots[1].T, g.T @ roots[0].T
        new = [share * x @ x.T / 3 for x in (half_left, half_right)]
        pairs = zip(statistics or new, new, strict=True)
        statistics = [e * old + (1 - e) * x for old, x in pairs]
        roots = []
        for matrix in statistics:
            values, vectors = np.linalg.eigh(matrix)
            roots.append((values + 1e-6 * values[-1])[:, None] ** -0.5 * vectors.T)
    for i, expected in enumerate(equal_sizes(*statistics)):
        np.testing.assert_allclose(state.factors["3x3"][str(i)][0], expected, rtol=1e-7)
        q = np.asarray(state.bases["3x3"][str(i)][0])
        turned = q.T @ expected @ q
        np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=1e-9 * turned.max())


def test_gradients_of_a_kronecker_covariance_are_whitened(x64):
    """From singular first statistics: in few periods, at any scale, with entries of mean square 1."""
    rng = np.random.default_rng(4)
    left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (4, 6))
    noise = rng.normal(size=(120, 4, 6))
    # conditions of a hundred
    roots = (left * np.logspace(0, -1, 4), right * np.logspace(0, -1, 6))
    gradients = roots[0] @ noise @ roots[1].T
    tx = ko.scale_by_shampoo(statistics="kl", decay=0.95, inverse_every=2)
    updates, _ = c.run(tx, gradients)
    squares = np.mean(np.square(updates), axis=(1, 2))
    np.testing.assert_allclose(np.mean(squares[40:]), 1.0, rtol=0.15)
    # no update is longer than statistics that know of it could make it
    e = np.minimum(1 - 1 / np.arange(1, 121), 0.95)
    assert np.all(squares <= (1 + 1e-9) / (1 - e))
    scaled, _ = c.run(tx, 1e-5 * gradients)
    np.testing.assert_allclose(scaled, updates, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("scale_by", [ko.scale_by_shampoo, ko.scale_by_soap])
def test_factors_stay_of_one_size_where_inputs_are_always_zero(scale_by):
    """Their product is right for ever, and none leaves the range of numbers."""
    tx = scale_by(statistics="kl", decay=0.9, inverse_every=2, merge=1)
    seen = jnp.arange(6)[:, None] >= 3

    def step(state, key):
        update, state = tx.update(jax.random.normal(key, (6, 4)) * seen, state)
        return state, jnp.mean(jnp.square(update))

    keys = jax.random.split(jax.random.key(0), 3000)
    train = jax.jit(lambda state: jax.lax.scan(step, state, keys))
    state, squares = train(tx.init(jnp.zeros((6, 4))))
    left, right = (jnp.diagonal(x[0]) for x in state.factors["6x4"].values())
    np.testing.assert_allclose(jnp.mean(left), jnp.mean(right), rtol=0.1)
    np.testing.assert_allclose(jnp.mean(squares[1500:]), jnp.mean(squares[:1500]), rtol=0.15)
    assert int(state.counts.skipped_statistics) == 0


def test_statistics_of_a_vector_are_the_average(x64):
    gradients = c.draws(5, 4, steps=5)
    kl, _ = c.run(ko.scale_by_shampoo(**EXACT), gradients)
    outer, _ = c.run(ko.scale_by_shampoo(**(EXACT | {"statistics": "outer"})), gradients)
    np.testing.assert_allclose(kl, outer, rtol=1e-8)


def test_long_axes_and_bad_batches():
    """A diagonal takes part; a start of zeros and a gradient that is not finite change nothing."""
    tx = ko.scale_by_shampoo(
        statistics="kl", decay=0.9, inverse_every=3, max_dim=4, long_axes="diagonal"
    )
    good = [1e-3 * x for x in c.draws(6, 6, 3, steps=3).astype(np.float32)]
    bad = np.full((6, 3), np.nan, np.float32)
    with_bad, after = c.run(tx, [good[0], bad, *good[1:]])
    without, state = c.run(tx, good)
    h.assert_close([with_bad[0], *with_bad[2:]], without, rtol=1e-5)
    h.assert_close(after.factors, state.factors, rtol=1e-5)
    np.testing.assert_array_equal(with_bad[1], np.zeros((6, 3)))
    assert state.factors["6dx3"]["0"].shape == (1, 6)
    late, _ = c.run(tx, [np.zeros((6, 3), np.float32), *good])
    assert np.isfinite(late).all() and np.abs(late[-1]).max() > 0.1


def test_trains_a_small_net_as_well_as_adam():
    adam = c.final_loss(optax.adam(3e-2))
    assert c.final_loss(ko.shampoo(1e-2, statistics="kl", decay=0.95)) < adam
    assert c.final_loss(ko.soap(3e-2, statistics="kl")) < adam


@pytest.mark.parametrize("scale_by", [ko.scale_by_shampoo, ko.scale_by_soap])
def test_wrong_arguments(scale_by):
    with pytest.raises(ValueError, match="statistics"):
        scale_by(statistics="inner")
    with pytest.raises(ValueError, match=r"decay=1, which sums; expected an average"):
        scale_by(statistics="kl", decay=1)
    with pytest.raises(ValueError, match=r"which sums"):
        scale_by(statistics="kl", decay=np.float32(1))


def test_a_decay_that_comes_to_one_is_ignored():
    """Sums would count every gradient once more than the average that they go on from."""
    gradients = c.draws(7, 3, 3, steps=3).astype(np.float32)
    options = EXACT | {"ridge": 1e-6}
    rising = lambda t: 0.4 + 0.6 * (t > 1)
    late = c.run(ko.scale_by_shampoo(**(options | {"decay": rising})), gradients)
    same = c.run(ko.scale_by_shampoo(**(options | {"decay": 0.4})), gradients)
    np.testing.assert_array_equal(late[0], same[0])
    assert int(late[1].given["given_decay"].ignored_values) == 1


def test_roots_of_their_own_are_square_roots():
    with pytest.raises(ValueError, match=r"statistics='kl' with root=4; expected root=None"):
        ko.scale_by_shampoo(statistics="kl", decay=0.9, root=4)
    with pytest.raises(ValueError, match=r"decay=1.0, which sums"):
        ko.shampoo(0.1, statistics="kl")
    with pytest.raises(ValueError, match=r"distributed_shampoo: statistics='kl' with root=4"):
        ko.distributed_shampoo(0.1, statistics="kl", root=4)
