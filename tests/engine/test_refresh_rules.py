"""Blocks with a rule of their own for refreshes: intervals that grow, and inverses used late."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax.blocks.kronecker.kronecker import Factors

P, Q, LAM = 3, 2, 0.3
BLOCK = ko.kronecker("cholesky")


def setup(block, inverse_every=1):
    """A compiled step without statistics, and the state before the first."""
    estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    w = np.arange(1.0, 1 + P * Q).reshape(P, Q)
    layers = estimator.layers(w, jnp.ones((2, P)))
    tx = ko.scale_by_curvature(layers, block=block, inverse_every=inverse_every, damping=LAM)
    step = jax.jit(lambda state: tx.update(w, state, curvature=None))
    return step, tx.init(w)


def random_factors(seed):
    random = np.random.default_rng(seed)
    roots = [random.normal(size=(1, d, d)) for d in (P, Q)]
    return Factors(*(jnp.asarray(x @ x.swapaxes(1, 2) + np.eye(x.shape[1])) for x in roots))


def run(block, factors, inverse_every=1):
    """Updates and what is held, one step for each of the factors; each a new statistic."""
    step, state = setup(block, inverse_every)
    seen = []
    for each in factors:
        count = state.curvature_count + 1
        update, state = step(state._replace(factors={"dense_3x2": each}, curvature_count=count))
        seen.append((update, state.inverses["dense_3x2"]))
    return seen


def refreshed(seen):
    """Steps in which the layer was refreshed, counted by its own rule."""
    counts = np.array([0] + [int(held.refreshes[0]) for _, held in seen])
    return [int(i) for i in np.flatnonzero(np.diff(counts))]


def test_constant_statistics_are_refreshed_at_intervals_that_grow(x64):
    seen = run(ko.similarity_gate(BLOCK), [random_factors(0)] * 21)
    steps = refreshed(seen)
    assert np.diff(steps).tolist() == [1, 1, 2, 3, 5, 8]


def test_statistics_without_likeness_are_refreshed_always(x64):
    block = ko.similarity_gate(BLOCK)
    assert refreshed(run(block, map(random_factors, range(6)))) == list(range(6))
    exact = ko.similarity_gate(BLOCK, tolerance=0.0)
    assert refreshed(run(exact, [random_factors(0)] * 4)) == list(range(4))


def test_an_interval_is_kept_or_halved_where_likeness_ends(x64):
    """Like the last, but not like the one before: the same again; like neither: half of it."""
    first, other = random_factors(0), random_factors(1)
    # refreshes at 0, 1, 2, 4, 7: the last interval is 5, unlike the first; then the other stays
    factors = [first] * 7 + [other] * 30
    assert np.diff(refreshed(run(ko.similarity_gate(BLOCK), factors)))[:8].tolist() == [
        1,
        1,
        2,
        3,
        1,
        1,
        2,
        3,
    ]


def test_a_statistic_that_was_dropped_makes_no_interval_longer(x64):
    step, state = setup(ko.similarity_gate(BLOCK))
    for _ in range(3):
        _, state = step(state._replace(factors={"dense_3x2": random_factors(0)}))
    held = state.inverses["dense_3x2"]
    assert (int(held.refreshes[0]), int(held.waited[0]), int(held.interval[0])) == (1, 0, 1)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_an_inverse_is_used_so_many_steps_late(steps, x64):
    """Against a list of what a schedule would have made at once."""
    every, count = 3, 8
    factors = [random_factors(i) for i in range(count)]
    got = [update for update, _ in run(ko.delayed(BLOCK, every=every, steps=steps), factors)]
    fresh = [update for update, _ in run(BLOCK, factors)]
    for t in range(count):
        made = (t - steps) // every * every if t >= steps else 0
        np.testing.assert_allclose(got[t], fresh[made], rtol=1e-12)
    assert not np.allclose(got[-1], fresh[-1], rtol=1e-3)


def test_without_delay_it_is_the_plain_schedule(x64):
    factors = [random_factors(i) for i in range(5)]
    late = run(ko.delayed(BLOCK, every=2, steps=0), factors)
    plain = run(BLOCK, factors, inverse_every=2)
    for (x, _), (y, _) in zip(late, plain, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ko.similarity_gate(BLOCK, tolerance=-1.0), "tolerance=-1.0; expected"),
        (lambda: ko.similarity_gate(ko.low_rank(2)), r"similarity_gate: .* its own .*\(refresh\)"),
        (lambda: ko.delayed(ko.ekfac_block(), every=2, steps=1), r"\(absorb, reads_inverse\)"),
        (lambda: ko.delayed(BLOCK, every=0, steps=0), "every=0; expected every >= 1"),
        (lambda: ko.delayed(BLOCK, every=2, steps=2), "steps=2; expected steps <= 1"),
        (lambda: ko.delayed(BLOCK, every=2, steps=-1), "steps=-1"),
    ],
)
def test_wrong_settings_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()
