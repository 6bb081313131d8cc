"""Inverse factors of rank-one updates against dense inverses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax._types import Average
from kfac_optax.blocks.rank_one.mkor import FORMS, mkor_block
from kfac_optax.blocks.rank_one.rank_one import Means
from tests import oracles

P, Q, DECAY = 4, 3, 0.9


def followed(block, means, decay=DECAY):
    """The inverse after every one of some means `(a [k, p], b [k, q])`, stacked."""
    start = block.factorize(jax.tree.map(lambda x: x[0], means), jnp.zeros(()))

    def step(inverse, new):
        inverse = block.absorb(inverse, new, new, 0.1, Average(0.0, 1, jnp.asarray(decay)))
        return inverse, inverse

    return jax.jit(lambda means: jax.lax.scan(step, start, means)[1])(means)


def draw(steps, seed=0):
    return Means(oracles.normal(seed, (steps, P)), oracles.normal(seed + 1, (steps, Q)))


def dense_exact(vectors, decay):
    """Inverses of the average, from scratch each time."""
    average = np.eye(vectors.shape[1])
    for v in np.asarray(vectors):
        average = decay * average + (1 - decay) * np.outer(v, v)
        yield np.linalg.inv(average)


def dense_blend(vectors, decay):
    eye = j = np.eye(vectors.shape[1])
    for v in np.asarray(vectors):
        j = np.linalg.inv(np.linalg.inv(decay * j + (1 - decay) * eye) + np.outer(v, v))
        yield j


def dense_sum(vectors, decay):
    j, c = np.eye(vectors.shape[1]), 1 - decay
    for v in np.asarray(vectors):
        rank_one = j @ np.outer(v, v) @ j / (1 + decay * c * v @ j @ v)
        j = decay * j + c / decay**2 * rank_one
        yield j


DENSE = {"exact": dense_exact, "blend": dense_blend, "sum": dense_sum}


def test_exact_updates_are_the_inverse_of_the_average(x64):
    """Along a hundred steps, without the bound."""
    means = draw(100)
    got = followed(mkor_block(threshold=None), means)
    for ours, vectors in zip(got, means, strict=True):
        np.testing.assert_allclose(ours, list(dense_exact(vectors, DECAY)), rtol=1e-9, atol=1e-10)


def test_exact_updates_stay_close_in_single_precision():
    means = jax.tree.map(lambda x: x.astype(jnp.float32), draw(100))
    got = followed(mkor_block(threshold=None), means)
    for ours, vectors in zip(got, means, strict=True):
        for j, want in zip(ours, dense_exact(np.float64(vectors), DECAY), strict=True):
            assert np.abs(j - want).max() < 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("form", ["blend", "sum"])
def test_the_other_forms(x64, form):
    means = draw(5)
    got = followed(mkor_block(form, threshold=None), means)
    for ours, vectors in zip(got, means, strict=True):
        np.testing.assert_allclose(ours, list(DENSE[form](vectors, DECAY)), rtol=1e-9)


@pytest.mark.parametrize("threshold", [None, 2.0])
@pytest.mark.parametrize("form", FORMS)
def test_inverses_stay_symmetric_and_positive_definite(x64, form, threshold):
    got = followed(mkor_block(form, threshold=threshold), draw(30))
    for js in got:
        np.testing.assert_array_equal(js, js.mT)
        assert np.linalg.eigvalsh(js).min() > 0


def test_what_is_never_seen_grows_until_it_is_mixed(x64):
    """Means of zero: `J = e^{-k} I` without the bound; with it the bound is left once a step."""
    zeros = jax.tree.map(jnp.zeros_like, draw(20))
    free = followed(mkor_block(threshold=None), zeros).inputs
    powers = DECAY ** -np.arange(1.0, 21)
    np.testing.assert_allclose(free, powers[:, None, None] * np.eye(P), rtol=1e-12)
    bounded = followed(mkor_block(threshold=2.0, mixing=0.8), zeros).inputs
    j = 1.0
    for got in bounded:
        j = j / DECAY
        j = 0.8 * j + 0.2 if j > 2 else j
        np.testing.assert_allclose(got, j * np.eye(P), rtol=1e-12)
    assert np.abs(bounded).max() <= 2


def test_means_are_cut(x64):
    means = Means(jnp.full((1, P), 1e6), jnp.full((1, Q), -1e6))
    cut = Means(jnp.full((1, P), 3.0), jnp.full((1, Q), -3.0))
    got, want = (followed(mkor_block(largest=3.0), m) for m in (means, cut))
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_is_close_and_symmetric(form):
    means = jax.tree.map(lambda x: x.astype(jnp.float32), draw(10))
    wide, narrow = (
        followed(mkor_block(form, inverse_dtype=dtype), means) for dtype in (None, jnp.bfloat16)
    )
    for ours, js in zip(wide, narrow, strict=True):
        assert js.dtype == jnp.bfloat16
        js = np.float32(js)
        np.testing.assert_array_equal(js, np.swapaxes(js, 1, 2))
        assert np.abs(js - ours).max() < 0.05 * np.abs(ours).max()


@pytest.mark.parametrize("form", FORMS)
def test_an_update_costs_the_square_of_the_width(form):
    """As XLA counts it in the compiled program: twice the width is four times the work."""
    counted = []
    for width in (64, 128):
        shapes = jax.ShapeDtypeStruct((width,), jnp.float32)
        means, block = Means(shapes, shapes), mkor_block(form)
        start = jax.eval_shape(lambda m, b=block: b.factorize(m, jnp.zeros(())), means)
        average = Average(jnp.float32(0.0), jnp.int32(1), jnp.float32(DECAY))
        absorb = lambda inverse, new, b=block: b.absorb(inverse, new, new, 0.1, average)
        counted.append(jax.jit(absorb).lower(start, means).compile().cost_analysis()["flops"])
    assert counted[1] < 4.2 * counted[0] < 4.2 * 40 * 64**2


def test_errors():
    with pytest.raises(ValueError, match="expected one of 'exact', 'blend', 'sum'"):
        mkor_block("paper")
    with pytest.raises(ValueError, match="mixing=1.5"):
        mkor_block(mixing=1.5)
    with pytest.raises(ValueError, match="threshold=0"):
        mkor_block(threshold=0)
    with pytest.raises(ValueError, match="largest=-1"):
        mkor_block(largest=-1)


def test_estimators_without_losses_say_what_to_use():
    forward = ko.forward_only(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    w, x = jnp.ones((2, 1)), jnp.ones((3, 2))
    plan = oracles.plan(forward.layers(w, x), dtype=jnp.float32, block=mkor_block())
    with pytest.raises(ValueError, match=r"forward_only.at: mkor .*Use empirical_fisher"):
        forward.at(w, x).statistics(plan)
