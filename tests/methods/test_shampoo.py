"""Shampoo against dense linear algebra, AdaGrad and its own invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from tests import helpers as h
from tests.methods import gradient_cases as c

EXACT = dict(ridge=0.0, inverse_every=1, merge=1)


def root_of(matrix, p):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * values ** (-1 / p)) @ vectors.T


@pytest.mark.parametrize("inverse", ["eigh", "newton"])
def test_first_step_is_the_polar_factor(x64, inverse):
    """Any wrong exponent fails."""
    g = c.draws(0, 5, 5, steps=1)[0]
    u, _, v = np.linalg.svd(g)
    (got,), _ = c.run(ko.scale_by_shampoo(**EXACT, inverse=inverse), [g])
    np.testing.assert_allclose(got, u @ v, atol=1e-10 if inverse == "eigh" else 1e-7)


def test_vector_is_full_matrix_adagrad(x64):
    gradients = c.draws(1, 4, steps=8)
    updates, _ = c.run(ko.scale_by_shampoo(**EXACT), gradients)
    for t in range(3, 8):  # full rank
        outer = gradients[: t + 1].T @ gradients[: t + 1]
        expected = root_of(outer, 2) @ gradients[t]
        np.testing.assert_allclose(updates[t], expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_scalar_is_adagrad(x64, shape):
    gradients = c.draws(2, *shape)
    updates, _ = c.run(ko.scale_by_shampoo(**EXACT), gradients)
    adagrad = optax.scale_by_rss(initial_accumulator_value=0.0, eps=0.0)
    expected, _ = c.run(adagrad, gradients)
    np.testing.assert_allclose(updates, expected, rtol=1e-12)


def test_diagonal_vectors_are_adagrad(x64):
    gradients = c.draws(2, 6)
    updates, _ = c.run(ko.scale_by_shampoo(**EXACT, vectors="diagonal"), gradients)
    adagrad = optax.scale_by_rss(initial_accumulator_value=0.0, eps=0.0)
    np.testing.assert_allclose(updates, c.run(adagrad, gradients)[0], rtol=1e-12)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_dense_kronecker_product_of_roots(x64, shape, ridge):
    """Order three needs sixth roots."""
    gradients = c.draws(3, *shape, steps=14)
    updates, _ = c.run(ko.scale_by_shampoo(**(EXACT | {"ridge": ridge})), gradients)
    factors = []
    for axis, n in enumerate(shape):
        unfolded = np.moveaxis(gradients, axis + 1, 1).reshape(len(gradients), n, -1)
        total = np.einsum("tij,tkj->ik", unfolded, unfolded)
        factors.append(total + ridge * np.linalg.eigvalsh(total)[-1] * np.eye(n))
    dense = np.ones((1, 1))
    for factor in factors:
        dense = np.kron(dense, factor)
    expected = root_of(dense, 2 * len(shape)) @ gradients[-1].ravel()
    np.testing.assert_allclose(updates[-1].ravel(), expected, rtol=1e-8, atol=1e-10)


def test_root_of_its_own(x64):
    gradients = c.draws(4, 3, 3)
    updates, _ = c.run(ko.scale_by_shampoo(**EXACT, root=2), gradients)
    left = sum(g @ g.T for g in gradients)
    right = sum(g.T @ g for g in gradients)
    expected = root_of(left, 2) @ gradients[-1] @ root_of(right, 2)
    np.testing.assert_allclose(updates[-1], expected, rtol=1e-8)


def test_rotated_gradients_give_rotated_updates(x64):
    gradients = c.draws(5, 4, 3, steps=20)
    q1, q2 = (np.linalg.qr(c.draws(6, n, n, steps=1)[0])[0] for n in (4, 3))
    tx = ko.scale_by_shampoo(inverse_every=3)
    updates, _ = c.run(tx, gradients)
    rotated, _ = c.run(tx, q1 @ gradients @ q2)
    np.testing.assert_allclose(rotated, q1 @ np.asarray(updates) @ q2, atol=1e-5)


def test_diagonal_gradients_give_adagrad_on_the_diagonal(x64):
    entries = c.draws(7, 4)
    updates, _ = c.run(ko.scale_by_shampoo(**EXACT), [np.diag(e) for e in entries])
    expected = entries[-1] / np.sqrt(np.sum(entries**2, axis=0))
    np.testing.assert_allclose(updates[-1], np.diag(expected), atol=1e-10)


def test_average_is_the_bounded_one(x64):
    gradients = c.draws(8, 3, 3, steps=4)
    _, state = c.run(ko.scale_by_shampoo(decay=0.6), gradients)
    expected = gradients[0] @ gradients[0].T
    for t, g in enumerate(gradients[1:], start=2):
        e = min(1 - 1 / t, 0.6)
        expected = e * expected + (1 - e) * g @ g.T
    np.testing.assert_allclose(state.factors["3x3"]["0"][0], expected, rtol=1e-12)


def test_stale_roots_of_an_average_are_fresh_for_constant_gradients(x64):
    gradients = [c.draws(9, 3, 3, steps=1)[0]] * 6
    stale, _ = c.run(ko.scale_by_shampoo(decay=0.9, inverse_every=5), gradients)
    fresh, _ = c.run(ko.scale_by_shampoo(decay=0.9, inverse_every=1), gradients)
    np.testing.assert_allclose(stale, fresh, rtol=1e-9)


def test_roots_change_when_due_only():
    tx = ko.scale_by_shampoo(inverse_every=3)
    gradients = c.draws(10, 3, 3, steps=5)
    roots = [c.run(tx, gradients[:t])[1].inverses["3x3"]["0"] for t in range(1, 6)]
    np.testing.assert_array_equal(roots[0], roots[2])
    assert np.abs(roots[3] - roots[2]).max() > 1e-3
    np.testing.assert_array_equal(roots[3], roots[4])


def test_pieces_of_a_long_axis_are_problems_of_their_own(x64):
    """Five columns in pieces of three and, filled up, two."""
    gradients = c.draws(11, 3, 5)
    whole, state = c.run(ko.scale_by_shampoo(**EXACT, max_dim=3), gradients)
    assert state.factors["3x3"]["1"].shape == (2, 3, 3)
    left, _ = c.run(ko.scale_by_shampoo(**EXACT), gradients[:, :, :3])
    right, _ = c.run(ko.scale_by_shampoo(**EXACT), gradients[:, :, 3:])
    joined = np.concatenate([np.asarray(left), np.asarray(right)], axis=2)
    np.testing.assert_allclose(whole, joined, rtol=1e-7, atol=1e-9)


def test_bound_above_all_axes_splits_nothing(x64):
    gradients = c.draws(16, 3, 4)
    h.assert_equal(
        c.run(ko.scale_by_shampoo(max_dim=4), gradients)[0],
        c.run(ko.scale_by_shampoo(max_dim=900), gradients)[0],
    )


def test_diagonal_of_a_long_axis(x64):
    gradients = c.draws(12, 6, 3)
    tx = ko.scale_by_shampoo(**EXACT, max_dim=4, long_axes="diagonal")
    updates, state = c.run(tx, gradients)
    assert state.factors["6dx3"]["0"].shape == (1, 6)
    rows = np.sum(gradients**2, axis=(0, 2)) ** -0.25
    right = root_of(np.einsum("tij,tik->jk", gradients, gradients), 4)
    np.testing.assert_allclose(updates[-1], rows[:, None] * gradients[-1] @ right, rtol=1e-9)


def test_short_axes_are_merged(x64):
    gradients = c.draws(13, 2, 2, 5, 3)
    merged, _ = c.run(ko.scale_by_shampoo(merge=4), gradients)
    reshaped, _ = c.run(ko.scale_by_shampoo(merge=1), gradients.reshape(-1, 4, 5, 3))
    np.testing.assert_allclose(merged, np.reshape(reshaped, gradients.shape), rtol=1e-12)


@pytest.mark.parametrize("graft", ["sgd", "adam", "rms"])
def test_graft_has_the_norm_of_the_other_and_the_direction_of_shampoo(graft):
    other = {"sgd": optax.identity(), "adam": optax.scale_by_adam(), "rms": optax.scale_by_rms()}
    gradients = [c.tree_of_all_kinds(s) for s in range(4)]
    grafted, _ = c.run(ko.scale_by_shampoo(graft=graft), gradients)
    plain, _ = c.run(ko.scale_by_shampoo(), gradients)
    lengths, _ = c.run(other[graft], gradients)
    for mine, direction, length in zip(grafted, plain, lengths, strict=True):
        for name in mine:
            u, s, q = (np.ravel(tree[name]) for tree in (mine, direction, length))
            if u.size:
                expected = s * np.linalg.norm(q) / np.linalg.norm(s)
                np.testing.assert_allclose(u, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_is_the_trace_of_optax(nesterov):
    gradients = [c.tree_of_all_kinds(s) for s in range(4)]
    mine, _ = c.run(ko.scale_by_shampoo(momentum=0.9, nesterov=nesterov), gradients)
    chain = optax.chain(ko.scale_by_shampoo(), optax.trace(0.9, nesterov))
    h.assert_close(mine, c.run(chain, gradients)[0], rtol=1e-5)


def test_statistic_of_nothing_keeps_the_identity():
    """A leaf whose gradient starts at zero is not stuck with a root of zero."""
    gradients = [np.zeros((2, 2), np.float32), np.eye(2, dtype=np.float32)]
    updates, state = c.run(ko.scale_by_shampoo(inverse_every=5), gradients)
    np.testing.assert_array_equal(updates[0], np.zeros((2, 2)))
    np.testing.assert_array_equal(updates[1], np.eye(2))
    assert ko.problems(state) == []


def test_squares_that_overflow_are_dropped_and_counted():
    gradients = [np.eye(2, dtype=np.float32), np.full((2, 2), 1e30, np.float32)]
    _, state = c.run(ko.scale_by_shampoo(inverse_every=1), gradients)
    np.testing.assert_array_equal(state.factors["2x2"]["0"][0], np.eye(2))
    assert int(state.counts.skipped_statistics) == 2
    assert "overflow" in ko.problems(state)[0]


def test_failed_roots_keep_the_last_good_ones(monkeypatch):
    from kfac_optax.methods.gradient import shampoo_phases

    gradients = c.draws(14, 2, 2, steps=2)
    _, before = c.run(ko.scale_by_shampoo(inverse_every=1), gradients[:1])
    monkeypatch.setattr(
        shampoo_phases, "inverse_root", lambda m, *_, **__: jnp.full_like(m, jnp.nan)
    )
    tx = ko.scale_by_shampoo(inverse_every=1)
    update, after = tx.update(jnp.asarray(gradients[1], jnp.float32), before)
    h.assert_equal(after.inverses, before.inverses)
    assert int(after.counts.failed_inverses) == 2
    assert np.isfinite(update).all()


def test_trains_a_small_net_as_well_as_adam():
    adam = c.final_loss(optax.adam(3e-2))
    assert c.final_loss(ko.shampoo(3e-2)) < adam
    assert c.final_loss(ko.shampoo(3e-2, graft="adam", decay=0.95, momentum=None)) < adam


@pytest.mark.parametrize("decay", [1.0, 0.8])
def test_fresh_roots_are_never_cut(x64, decay):
    """The root of a matrix that is asked for by number has no bound."""
    gradients = c.draws(15, 3, 4, steps=6)
    gradients[3] *= 100
    fresh = EXACT | {"decay": decay}
    bounded, _ = c.run(ko.scale_by_shampoo(**fresh), gradients)
    h.assert_equal(bounded, c.run(ko.scale_by_shampoo(**fresh, root=4), gradients)[0])


def test_directions_that_roots_do_not_know_are_not_blown_up(x64):
    gradients = [np.outer(e, e) for e in np.eye(3)]
    bounded, _ = c.run(ko.scale_by_shampoo(inverse_every=10), gradients)
    unbounded, _ = c.run(ko.scale_by_shampoo(inverse_every=10, root=4), gradients)
    assert np.linalg.norm(unbounded[1]) > 900
    np.testing.assert_allclose(np.linalg.norm(bounded[1]), np.sqrt(3), rtol=1e-6)


def test_preset_is_the_chain():
    gradients = [c.tree_of_all_kinds(s) for s in range(3)]
    chain = optax.chain(
        ko.scale_by_shampoo(momentum=0.9),
        optax.add_decayed_weights(1e-2),
        optax.scale_by_learning_rate(0.1),
    )
    h.assert_equal(
        c.run(ko.shampoo(learning_rate=0.1, weight_decay=1e-2), gradients)[0],
        c.run(chain, gradients)[0],
    )


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"decay": 1.5}, ValueError, "decay"),
        ({"ridge": -1.0}, ValueError, "ridge"),
        ({"graft": "lion"}, ValueError, "graft"),
        ({"root": 0}, ValueError, "root"),
        ({"inverse": "qr"}, ValueError, "inverse"),
        ({"max_dim": 0}, ValueError, "max_dim"),
        ({"max_dim": jnp.float32(3)}, TypeError, 'static_args=\\("max_dim",\\)'),
        ({"long_axes": "identity"}, ValueError, "long_axes"),
        ({"vectors": "identity"}, ValueError, "vectors"),
    ],
)
def test_wrong_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        ko.scale_by_shampoo(**arguments)


def test_gradients_of_other_parameters_raise():
    tx = ko.scale_by_shampoo()
    with pytest.raises(ValueError, match="that `init` got"):
        tx.update(jnp.ones((2, 3)), tx.init(jnp.ones((4, 3))))


def test_roots_of_many_equal_layers_are_one_batched_call():
    """The compiled step of 64 layers factorises as often as that of two."""

    def factorisations(depth):
        params = {f"layer_{i}": jnp.ones((3, 4)) for i in range(depth)}
        tx = ko.scale_by_shampoo()
        text = jax.jit(tx.update).lower(params, tx.init(params)).as_text()
        return text.count("syevd"), len(jax.jit(tx.update).lower(params, tx.init(params)).as_text())

    assert factorisations(64)[0] == factorisations(2)[0] > 0
