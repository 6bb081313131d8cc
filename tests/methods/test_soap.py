"""SOAP against Adam, in the basis that it finds and without one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from tests import helpers as h
from tests.methods import gradient_cases as c


def adam(**kwargs):
    return optax.scale_by_adam(b1=0.95, b2=0.95, **kwargs)


def fixed_basis(seed=0, n=4, steps=12):
    """Orthogonal `u`, `w` and gradients `u diag(d_t) w^T`: one eigenbasis for all steps."""
    u, w = (np.linalg.qr(m)[0] for m in c.draws(seed, n, n, steps=2))
    entries = c.draws(seed + 1, n, steps=steps) * np.array([8.0, 4.0, 2.0, 1.0])
    entries[0] = [8.0, -4.0, 2.0, 1.0]
    return u, w, entries


@pytest.mark.parametrize("basis", ["qr", "eigh"])
@pytest.mark.parametrize("inverse_every", [1, 3])
def test_one_eigenbasis_is_adam_in_it(x64, basis, inverse_every):
    """Columns change places when the order of the eigenvalues does, and squares go with them."""
    u, w, entries = fixed_basis()
    if basis == "eigh":  # squares stay with the rank, which is right only where ranks stay
        entries = np.sign(entries) * np.array([8.0, 4.0, 2.0, 1.0])
    gradients = [(u * d) @ w.T for d in entries]
    updates, _ = c.run(ko.scale_by_soap(inverse_every=inverse_every, basis=basis), gradients)
    expected, _ = c.run(adam(), list(entries[1:]))
    np.testing.assert_array_equal(updates[0], np.zeros((4, 4)))
    for got, d in zip(updates[1:], expected, strict=True):
        np.testing.assert_allclose(u.T @ got @ w, np.diag(d), atol=1e-6)


def test_no_basis_is_adam():
    gradients = [c.tree_of_all_kinds(s) for s in range(6)]
    updates, _ = c.run(ko.scale_by_soap(max_dim=1), gradients)
    h.assert_close(updates, c.run(adam(), gradients)[0], rtol=1e-6, atol=1e-6)


def test_vectors_and_scalars_are_adam():
    names = ("scalar", "vector", "empty")
    gradients = [{n: c.tree_of_all_kinds(s)[n] for n in names} for s in range(6)]
    updates, _ = c.run(ko.scale_by_soap(), gradients)
    h.assert_close(updates, c.run(adam(), gradients)[0], rtol=1e-6, atol=1e-6)


def test_long_axis_is_one_sided(x64):
    """Adam in the eigenvectors of the short axis alone."""
    gradients = c.draws(2, 7, 3)
    tx = ko.scale_by_soap(max_dim=4, basis="eigh", inverse_every=10)
    updates, state = c.run(tx, gradients)
    q = np.linalg.eigh(gradients[0].T @ gradients[0])[1]
    expected, _ = c.run(adam(), gradients[1:] @ q)
    np.testing.assert_allclose(updates[1:], np.asarray(expected) @ q.T, atol=1e-9)
    assert list(state.bases["7ix3"]) == ["1"]


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (3, 3)])
def test_short_side_alone(x64, shape):
    """Adam in the eigenvectors of the shorter axis, whatever the length of the other."""
    gradients = c.draws(12, *shape)
    tx = ko.scale_by_soap(sides="short", basis="eigh", inverse_every=10, merge=1)
    updates, state = c.run(tx, gradients)
    (axis,) = next(iter(state.bases.values()))
    assert axis == ("1" if shape[0] > shape[1] else "0")
    if axis == "0":
        gradients, updates = gradients.swapaxes(1, 2), np.swapaxes(updates, 1, 2)
    q = np.linalg.eigh(gradients[0].T @ gradients[0])[1]
    expected, _ = c.run(adam(), gradients[1:] @ q)
    np.testing.assert_allclose(updates[1:], np.asarray(expected) @ q.T, atol=1e-9)


def dense_soap(gradients, every, b=0.95, eps=1e-8):
    """Algorithm 3 for one matrix, written out with NumPy."""
    left, right = gradients[0] @ gradients[0].T, gradients[0].T @ gradients[0]
    ql, qr = (np.linalg.eigh(s)[1][:, ::-1] for s in (left, right))
    m = v = np.zeros_like(gradients[0])
    yield m
    for t, g in enumerate(gradients[1:], start=1):
        m = b * m + (1 - b) * g
        v = b * v + (1 - b) * (ql.T @ g @ qr) ** 2
        mean, square = ql.T @ m @ qr / (1 - b**t), v / (1 - b**t)
        yield ql @ (mean / (np.sqrt(square) + eps)) @ qr.T
        e = min(1 - 1 / (t + 1), b)
        left = e * left + (1 - e) * g @ g.T
        right = e * right + (1 - e) * g.T @ g
        if t % every == 0:
            lo, ro = (np.argsort(-np.diag(q.T @ s @ q)) for q, s in ((ql, left), (qr, right)))
            v = v[lo][:, ro]
            ql, qr = np.linalg.qr(left @ ql[:, lo])[0], np.linalg.qr(right @ qr[:, ro])[0]


@pytest.mark.parametrize("every", [1, 2, 5])
def test_dense_reference(x64, every):
    gradients = c.draws(3, 4, 3, steps=12)
    gradients[:, :, 0] *= np.linspace(0.1, 4, 12)[:, None]  # columns change places
    updates, _ = c.run(ko.scale_by_soap(inverse_every=every), gradients)
    # one row more than columns: the last direction of the first basis has no gradient, any sign
    np.testing.assert_allclose(updates, list(dense_soap(gradients, every)), atol=1e-9)


def test_power_iteration_finds_the_eigenvectors(x64):
    base = np.linalg.qr(c.draws(4, 4, 4, steps=1)[0])[0]
    steady = base * np.array([8.0, 4.0, 2.0, 1.0])
    first = c.draws(5, 4, 4, steps=1)[0]
    tx = ko.scale_by_soap(inverse_every=1, decay=0.0)
    _, state = c.run(tx, [first, *[steady] * 30])
    overlap = np.abs(base.T @ np.asarray(state.bases["4x4"]["0"][0]))
    np.testing.assert_allclose(overlap, np.eye(4), atol=1e-6)


def test_rotated_gradients_give_rotated_updates(x64):
    gradients = c.draws(6, 3, 3, steps=12)
    q1, q2 = (np.linalg.qr(c.draws(7, 3, 3, steps=2)[i])[0] for i in range(2))
    tx = ko.scale_by_soap(inverse_every=2)
    updates, _ = c.run(tx, gradients)
    rotated, _ = c.run(tx, q1 @ gradients @ q2)
    np.testing.assert_allclose(rotated, q1 @ np.asarray(updates) @ q2, atol=1e-8)


def test_bases_stay_orthogonal():
    _, state = c.run(ko.scale_by_soap(inverse_every=1), c.draws(8, 5, 3, steps=30))
    for q in state.bases["5x3"].values():
        np.testing.assert_allclose(q.mT @ q, np.eye(q.shape[-1])[None], atol=1e-5)


def test_failed_basis_keeps_the_last_good_one(monkeypatch):
    from kfac_optax.methods.gradient import soap_bases

    gradients = c.draws(9, 3, 3, steps=2).astype(np.float32)
    tx = ko.scale_by_soap(inverse_every=1)
    _, before = c.run(tx, gradients[:1])

    def fails(matrices, q):
        order = jnp.broadcast_to(jnp.arange(3), q.shape[:-1])
        return jnp.full_like(q, jnp.nan), order

    monkeypatch.setattr(soap_bases, "_power_step", fails)
    update, after = tx.update(jnp.asarray(gradients[1]), before)
    h.assert_equal(after.bases, before.bases)
    assert int(after.counts.failed_inverses) == 2
    assert np.isfinite(update).all()


def test_squares_that_overflow_leave_the_moments_as_they_were():
    usual, large = np.eye(2, dtype=np.float32), np.full((2, 2), 1e30, np.float32)
    updates, state = c.run(ko.scale_by_soap(), [usual, usual, large, usual])
    np.testing.assert_array_equal(updates[2], np.zeros((2, 2)))
    np.testing.assert_allclose(updates[3], np.eye(2), atol=1e-5)
    assert int(state.counts.non_finite_updates) == 1


def test_trains_a_small_net_as_well_as_adam():
    assert c.final_loss(ko.soap(3e-2)) < c.final_loss(optax.adam(3e-2))


def test_preset_is_the_chain():
    gradients = [c.tree_of_all_kinds(s) for s in range(3)]
    chain = optax.chain(
        ko.scale_by_soap(), optax.add_decayed_weights(1e-2), optax.scale_by_learning_rate(0.1)
    )
    mine, _ = c.run(ko.soap(learning_rate=0.1, weight_decay=1e-2), gradients)
    h.assert_equal(mine, c.run(chain, gradients)[0])


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"b1": 1.5}, ValueError, "b1"),
        ({"b2": -1}, ValueError, "b2"),
        ({"eps": -1.0}, ValueError, "eps"),
        ({"basis": "svd"}, ValueError, "basis"),
        ({"long_axes": "diagonal"}, ValueError, "long_axes"),
        ({"sides": "left"}, ValueError, "sides"),
        ({"merge": jnp.float32(3)}, TypeError, 'static_args=\\("merge",\\)'),
    ],
)
def test_wrong_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        ko.scale_by_soap(**arguments)


def test_bases_of_many_equal_layers_are_one_batched_call():
    def factorisations(depth):
        params = {f"layer_{i}": jnp.ones((3, 4)) for i in range(depth)}
        tx = ko.scale_by_soap()
        text = jax.jit(tx.update).lower(params, tx.init(params)).as_text()
        return text.count("syevd"), text.count("geqrf")

    assert factorisations(64) == factorisations(2)
    assert min(factorisations(2)) > 0
