"""Distributed Shampoo written out with NumPy, and as the Shampoo that it is without its additions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from tests import helpers as h
from tests.methods import gradient_cases as c
from tests.methods.test_shampoo import root_of

PLAIN = dict(decay=1.0, graft=None, momentum=0.0, nesterov=False, start_step=0)


@pytest.mark.parametrize("statistics", [{"decay": 1.0}, {"statistics": "kl", "decay": 0.9}])
def test_without_its_additions_it_is_shampoo(statistics):
    gradients = [{n: c.tree_of_all_kinds(s)[n] for n in ("dense", "vector")} for s in range(4)]
    words = dict(max_dim=3, merge=16, inverse_every=2, inverse="eigh") | statistics
    mine, _ = c.run(ko.scale_by_distributed_shampoo(**(PLAIN | words)), gradients)
    h.assert_close(mine, c.run(ko.scale_by_shampoo(**words), gradients)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_two_momenta_written_out(x64, nesterov):
    """SGD with momentum alone for two steps, then Shampoo with its norms."""
    gradients = c.draws(0, 3, 4, steps=6)
    tx = ko.scale_by_distributed_shampoo(
        momentum=0.8,
        decay=0.7,
        ridge=1e-3,
        start_step=2,
        inverse_every=1,
        nesterov=nesterov,
        merge=1,
    )
    updates, _ = c.run(tx, gradients)
    left, right = np.zeros((3, 3)), np.zeros((4, 4))
    m_s = m_q = np.zeros((3, 4))
    for t, g in enumerate(gradients):
        e = min(1 - 1 / (t + 1), 0.7)
        left = e * left + (1 - e) * g @ g.T
        right = e * right + (1 - e) * g.T @ g
        roots = []
        for statistic in (left, right):
            shift = 1e-3 * np.linalg.eigvalsh(statistic)[-1]
            roots.append(root_of(statistic + shift * np.eye(len(statistic)), 4))
        s = roots[0] @ g @ roots[1]
        s = s * np.linalg.norm(g) / np.linalg.norm(s)
        m_s, m_q = 0.8 * m_s + s, 0.8 * m_q + g
        m, u = (m_s, s) if t >= 2 else (m_q, g)
        expected = 0.8 * m + u if nesterov else m
        # Newton takes the ridge relative to a bound of the largest eigenvalue, n^(1/128) off at most
        np.testing.assert_allclose(updates[t], expected, rtol=2e-3, atol=2e-3)


GRAFTS = {
    "adagrad": optax.scale_by_rss(initial_accumulator_value=0.0, eps=1e-10),
    "sign": optax.scale_by_sign(),
    "rms_normalized": optax.chain(
        optax.stateless(lambda u, p: jax.tree.map(lambda x: x / jnp.linalg.norm(x), u)),
        optax.scale_by_rms(),
    ),
}


@pytest.mark.parametrize("graft", GRAFTS)
def test_every_leaf_has_the_norm_of_the_other(graft):
    names = ("embedding", "vector")
    gradients = [{n: c.tree_of_all_kinds(s)[n] for n in names} for s in range(3)]
    words = PLAIN | {"graft": graft, "inverse": "eigh", "max_dim": 4}
    updates, _ = c.run(ko.scale_by_distributed_shampoo(**words), gradients)
    lengths, _ = c.run(GRAFTS[graft], gradients)
    for mine, other in zip(updates, lengths, strict=True):
        for name in names:
            size = np.linalg.norm(np.ravel(other[name]))
            np.testing.assert_allclose(np.linalg.norm(np.ravel(mine[name])), size, rtol=1e-5)


def test_statistics_and_roots_have_periods_of_their_own():
    tx = ko.scale_by_distributed_shampoo(curvature_every=2, inverse_every=3, inverse="eigh")
    state = tx.init(jnp.ones((3, 3)))
    step = jax.jit(tx.update)
    factors, roots = [], []
    for g in c.draws(1, 3, 3, steps=5).astype(np.float32):
        _, state = step(jnp.asarray(g), state)
        factors.append(state.factors["3x3"]["0"])
        roots.append(state.inverses["3x3"]["0"])
    for series, expected in ((factors, [False, True, False, True]), (roots, [0, 0, 1, 0])):
        changed = [not np.array_equal(x, y) for x, y in itertools.pairwise(series)]
        assert changed == [bool(x) for x in expected]


def test_statistics_with_a_period_are_a_mean_of_those_measured(x64):
    gradients = c.draws(2, 3, 3, steps=4)
    tx = ko.scale_by_distributed_shampoo(curvature_every=2, inverse="eigh")
    _, state = c.run(tx, gradients)
    expected = (gradients[0] @ gradients[0].T + gradients[2] @ gradients[2].T) / 2
    np.testing.assert_allclose(state.factors["3x3"]["0"][0], expected, rtol=1e-12)


def test_stale_roots_are_fresh_for_constant_gradients(x64):
    gradients = [c.draws(3, 3, 3, steps=1)[0]] * 6
    words = dict(inverse="eigh", start_step=2)
    stale, _ = c.run(ko.scale_by_distributed_shampoo(inverse_every=5, **words), gradients)
    fresh, _ = c.run(ko.scale_by_distributed_shampoo(inverse_every=1, **words), gradients)
    np.testing.assert_allclose(stale, fresh, rtol=1e-7)


def test_it_trains_faster_than_what_it_is_grafted_on():
    sgd = c.final_loss(optax.sgd(3e-2, momentum=0.9, nesterov=True))
    assert c.final_loss(ko.distributed_shampoo(3e-2, inverse="eigh")) < sgd


@pytest.mark.parametrize(
    ("arguments", "match"),
    [({"start_step": -1}, "start_step"), ({"graft": "sgd_"}, "graft"), ({"root": 0}, "root")],
)
def test_wrong_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        ko.scale_by_distributed_shampoo(**arguments)
