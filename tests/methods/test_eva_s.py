"""Eva-s against dense inverses and dense roots, axis by axis."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from tests import helpers as h
from tests.methods import gradient_cases as c

LAM, DECAY = 0.3, 0.6


def dense_means(gradients, decay):
    """Averages of the means over all axes but one, written out."""
    held = [np.zeros(n) for n in gradients[0].shape]
    for t, g in enumerate(gradients, start=1):
        e = min(1 - 1 / t, decay)
        for i, v in enumerate(held):
            others = tuple(axis for axis in range(g.ndim) if axis != i)
            held[i] = e * v + (1 - e) * g.mean(others)
    return held


@pytest.mark.parametrize("shape", [(4, 3), (5,), (2, 3, 4), ()])
def test_product_is_the_dense_inverse(x64, shape):
    gradients = c.draws(0, *shape)
    updates, _ = c.run(ko.scale_by_eva_s(damping=LAM, decay=DECAY), list(gradients))
    if shape == ():
        gradients = gradients[:, None]
    product = np.ones(1)
    for v in dense_means(gradients, DECAY):
        product = np.kron(product, v)
    damped = np.outer(product, product) + LAM * np.eye(product.size)
    want = np.linalg.solve(damped, gradients[-1].ravel())
    np.testing.assert_allclose(np.ravel(updates[-1]), want, rtol=1e-10)


@pytest.mark.parametrize("shape", [(4, 3), (5,), (2, 3, 4)])
def test_roots_are_dense_powers_of_each_axis(x64, shape):
    gradients = c.draws(1, *shape)
    tx = ko.scale_by_eva_s(damping=LAM, decay=DECAY, form="roots")
    updates, _ = c.run(tx, list(gradients))
    want = gradients[-1]
    for axis, v in enumerate(dense_means(gradients, DECAY)):
        values, vectors = np.linalg.eigh(np.outer(v, v) + LAM * np.eye(len(v)))
        root = (vectors * values ** (-1 / (2 * len(shape)))) @ vectors.T
        want = np.moveaxis(np.tensordot(root, want, (1, axis)), 0, axis)
    np.testing.assert_allclose(updates[-1], want, rtol=1e-10)


def test_on_a_vector_roots_are_full_adagrad_of_rank_one(x64):
    """One gradient: `(g g^T + damping I)^{-1/2} g = g / sqrt(damping + |g|^2)`."""
    g = c.draws(2, 5)[0]
    (update,), _ = c.run(ko.scale_by_eva_s(damping=LAM, form="roots"), [g])
    np.testing.assert_allclose(update, g / np.sqrt(LAM + g @ g), rtol=1e-12)


def test_the_state_is_one_number_for_every_index():
    params = c.tree_of_all_kinds()
    means = ko.scale_by_eva_s().init(params).means
    numbers = sum(x.size for x in jax.tree.leaves(means))
    assert numbers == sum(sum(x.shape) if x.ndim else 1 for x in params.values() if x.size)


def test_merged_axes_are_one():
    g = np.asarray(c.draws(3, 2, 3, 7)[0], np.float32)
    (update,), state = c.run(ko.scale_by_eva_s(merge=6), [g])
    (flat,), _ = c.run(ko.scale_by_eva_s(), [g.reshape(6, 7)])
    assert list(state.means) == ["6x7"]
    np.testing.assert_allclose(update, flat.reshape(2, 3, 7), rtol=1e-6)


def test_preset_is_the_chain():
    gradients = [c.tree_of_all_kinds(s) for s in range(3)]
    chain = optax.chain(
        ko.clip_by_kl(ko.scale_by_eva_s(damping=LAM), learning_rate=0.1, kl_clip=1e-2),
        optax.add_decayed_weights(1e-2),
        optax.trace(0.9),
        optax.scale_by_learning_rate(0.1),
    )
    tx = ko.eva_s(learning_rate=0.1, damping=LAM, kl_clip=1e-2, weight_decay=1e-2)
    h.assert_equal(c.run(tx, gradients)[0], c.run(chain, gradients)[0])


def test_it_trains():
    loss, params = c.small_problem()
    assert c.final_loss(ko.eva_s(learning_rate=0.03, kl_clip=1e-2)) < 0.25 * float(loss(params))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"damping": 0.0}, ValueError, "damping > 0"),
        ({"decay": 1.5}, ValueError, "decay"),
        ({"form": "root"}, ValueError, "'product', 'roots'"),
        ({"merge": jnp.float32(3)}, TypeError, 'static_args=\\("merge",\\)'),
    ],
)
def test_wrong_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        ko.scale_by_eva_s(**arguments)
