"""Jorge: orders of its series, the published form, and what that does not keep."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from kfac_optax.linalg.series_root import diagonal_step, root_step
from tests.methods import gradient_cases as c
from tests.methods.test_shampoo import root_of


def spd(seed, n=4):
    m = c.draws(seed, n, n + 2, steps=1)[0]
    return m @ m.T / n


def published(root, news, p, b):
    """`b^(-1/p) R (I - Y/p + (p + 1) Y^2 / 2p^2)`, one-sided."""
    y = np.linalg.matrix_power(root, p) @ news * (1 - b) / b
    series = np.eye(len(root)) - y / p + (p + 1) / (2 * p * p) * y @ y
    return b ** (-1 / p) * root @ series


def errors(before, news, p, sizes=(0.2, 0.1, 0.05)):
    """Of roots moved by `||Y||` of these sizes, relative; and of the published form."""
    root = root_of(before, p)
    found, theirs = [], []
    for size in sizes:
        odds = size / np.linalg.norm(np.linalg.matrix_power(root, p) @ news)
        b = 1 / (1 + odds)
        exact = root_of(b * before + (1 - b) * news, p)
        pairs = ((found, root_step(root, news, p, b)), (theirs, published(root, news, p, b)))
        for out, got in pairs:
            out.append(np.linalg.norm(got - exact) / np.linalg.norm(exact))
    return np.array(found), np.array(theirs)


@pytest.mark.parametrize("p", [2, 4, 6])
def test_the_root_of_commuting_matrices_is_of_third_order(x64, p):
    found, theirs = errors(np.diag([4.0, 2.0, 1.0, 0.5]), np.diag([1.0, 3.0, 0.2, 1.0]), p)
    for series in (found, theirs):
        np.testing.assert_allclose(series[:-1] / series[1:], 8, rtol=0.1)


def test_the_root_of_other_matrices_is_of_first_order(x64):
    """As the published form is."""
    found, theirs = errors(spd(0), spd(1), 4, sizes=(0.02, 0.01, 0.005))
    for series in (found, theirs):
        np.testing.assert_allclose(series[:-1] / series[1:], 2, rtol=0.1)
    assert (found < 1.1 * theirs).all()


@pytest.mark.parametrize("size", [1.0, 1e3, 1e9])
def test_the_step_of_a_large_statistic_is_full(size):
    """`||Y|| = 1` whatever `||X||` is, also where the weight `b` rounds to one."""
    root = 1e-6**-0.25 * np.eye(2, dtype=np.float32)
    news = np.array([[2.0, 1.0], [1.0, 2.0]], np.float32)
    y = news / np.linalg.norm(news)
    series = np.eye(2) - y / 8 + 9 / 128 * y @ y
    got = root_step(root, size * news, 4, 0.0)
    np.testing.assert_allclose(got, series.T @ root @ series, rtol=1e-5)
    diagonal = diagonal_step(root.diagonal(), np.full(2, size, np.float32), 4, 0.0)
    along = 0.5**0.5
    exact = root[0, 0] * (1 - along / 8 + 9 / 128 * along**2) ** 2
    np.testing.assert_allclose(diagonal, exact, rtol=1e-5)


def test_root_stays_positive_definite_where_the_published_form_does_not(x64):
    root, news = np.diag([31.0, 0.01]), np.ones((2, 2))
    size = np.linalg.norm(np.linalg.matrix_power(root, 4) @ news)
    one_sided = published(root, news, 4, size / (1 + size))
    assert np.linalg.eigvalsh((one_sided + one_sided.T) / 2)[0] < -0.05
    assert np.linalg.eigvalsh(root_step(root, news, 4, 0.0))[0] > 0


def test_diagonals_are_diagonal_matrices(x64):
    root, news = np.abs(c.draws(2, 2, 5, steps=1)[0]) + 0.1
    got = diagonal_step(root, news, 4, 0.9)
    np.testing.assert_allclose(
        np.diag(got), root_step(np.diag(root), np.diag(news), 4, 0.9), rtol=1e-12
    )


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_step_written_out(x64, decay):
    """Roots at every other step, momentum of both directions, then the norm of SGD's."""
    gradients = c.draws(3, 3, 4, steps=5)
    tx = ko.scale_by_jorge(momentum=0.8, decay=decay, eps=1e-2, inverse_every=2, merge=1)
    updates, _ = c.run(tx, gradients)
    left, right = 1e-2**-0.25 * np.eye(3), 1e-2**-0.25 * np.eye(4)
    m = n = np.zeros((3, 4))
    for t, g in enumerate(gradients):
        if t % 2 == 0:
            moved = []
            for root, news in ((left, g @ g.T), (right, g.T @ g)):
                x = np.linalg.matrix_power(root, 4) @ news
                size = np.linalg.norm(x)
                b = max(decay, size / (1 + size))
                y = x * (1 - b) / b
                assert np.linalg.norm(y) <= 1 + 1e-12
                series = np.eye(len(root)) - y / 8 + 9 / 128 * y @ y
                moved.append(b**-0.25 * series.T @ root @ series)
            left, right = moved
        m, n = 0.8 * m + left @ g @ right, 0.8 * n + g
        expected = m * np.linalg.norm(n) / np.linalg.norm(m)
        np.testing.assert_allclose(updates[t], expected, rtol=1e-9, atol=1e-12)


def test_norms_stay_without_graft(x64):
    gradients = c.draws(4, 3, 3, steps=3)
    grafted, _ = c.run(ko.scale_by_jorge(), gradients)
    plain, state = c.run(ko.scale_by_jorge(graft=None), gradients)
    assert list(state.trace) == ["preconditioned"]
    for mine, other in zip(grafted, plain, strict=True):
        unit = np.asarray(other) / np.linalg.norm(other)
        np.testing.assert_allclose(mine / np.linalg.norm(mine), unit, rtol=1e-9)


def test_statistic_of_nothing_keeps_the_roots():
    tx = ko.scale_by_jorge(inverse_every=1)
    state = tx.init(jnp.ones((2, 2)))
    _, after = jax.jit(tx.update)(jnp.zeros((2, 2)), state)
    np.testing.assert_array_equal(after.inverses["2x2"]["0"], state.inverses["2x2"]["0"])


def test_it_trains_faster_than_what_it_is_grafted_on():
    sgd = c.final_loss(optax.sgd(3e-2, momentum=0.9))
    assert c.final_loss(ko.jorge(3e-2)) < sgd


@pytest.mark.parametrize(
    ("arguments", "match"),
    [({"eps": 0.0}, "eps"), ({"decay": 1.5}, "decay"), ({"graft": "adam"}, "graft")],
)
def test_wrong_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        ko.scale_by_jorge(**arguments)
