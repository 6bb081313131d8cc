"""`<U_i, V_i>` of layers: from rows as from matrices, whatever their size, and never from a gradient
that nothing else forms.
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax.engine.slopes import FromRows, in_one_scale, of_matrices, of_rows
from kfac_optax.engine.state import the_state
from kfac_optax.linalg.powers import Scaled
from kfac_optax.step_rules.kl_clip import KLClipState
from tests import oracles

COPIES, ROWS, P, Q = 2, 3, 40, 30
SIZES = (39, 30, 3)
COMMON = dict(learning_rate=0.1, damping=1e-2, curvature_every=1, inverse_every=1)
FISHER = ko.fisher(oracles.classifier)


def rows(exponents=(0, 0, 0, 0), dtype=np.float64):
    """`b, h, a, g`, each times a power of two."""
    shapes = [(COPIES, ROWS, size) for size in (P, Q, P, Q)]
    arrays = [oracles.normal(i, shape) for i, shape in enumerate(shapes)]
    return [np.asarray(x, dtype) * dtype(2.0) ** e for x, e in zip(arrays, exponents, strict=True)]


def known(b, h, a, g):
    update = jnp.matmul(jnp.asarray(b).mT, jnp.asarray(h), precision="highest")
    return FromRows(update, (jnp.asarray(b), jnp.asarray(h)), (jnp.asarray(a), jnp.asarray(g)))


def exact(b, h, a, g):
    b, h, a, g = (np.asarray(x, np.longdouble) for x in (b, h, a, g))
    return np.einsum("cnp,cnq,cmp,cmq->c", b, h, a, g)


def value(slopes):
    return np.asarray(slopes.values, np.longdouble) * np.longdouble(2.0) ** int(slopes.exponent)


@pytest.mark.parametrize("many", [False, True])
def test_rows_give_what_matrices_give(x64, many):
    b, h, a, g = (np.tile(x, (1, 30 if many else 1, 1)) for x in rows())
    found = known(b, h, a, g)
    gradient = jnp.matmul(a.mT, g)
    np.testing.assert_allclose(value(of_rows(found)), exact(b, h, a, g), rtol=1e-12)
    np.testing.assert_allclose(
        value(of_matrices(found.update, gradient)), exact(b, h, a, g), rtol=1e-12
    )
    # of many rows the gradient is less work than products of all pairs
    assert found.few != many


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(st.lists(st.integers(-60, 60), min_size=4, max_size=4))
def test_rows_of_any_size_in_single_precision(exponents):
    parts = rows(exponents, np.float32)
    # an update itself that overflows is taken back as a whole
    hypothesis.assume(exponents[0] + exponents[1] < 110)
    found = of_rows(known(*parts))
    # far below what any rate makes a step of, and far above, the size is all that counts
    want = exact(*parts)
    np.testing.assert_allclose(value(found), want, rtol=1e-4)


def test_layers_of_very_different_size_in_one_scale():
    found = [Scaled(jnp.array([1.5]), jnp.int32(e)) for e in (-200, 0, 100, 101)]
    together = in_one_scale([*found, Scaled(jnp.zeros(2), jnp.int32(240))])
    np.testing.assert_array_equal(together.values, [0, 1.5 * 2.0**-101, 0.75, 1.5, 0, 0])
    assert together.exponent == 101
    # of a slope of zero the exponent says nothing
    small = in_one_scale(
        [Scaled(jnp.array([1.5]), jnp.int32(-200)), Scaled(jnp.zeros(1), jnp.int32(0))]
    )
    np.testing.assert_array_equal(small.values, [1.5, 0])
    assert small.exponent == -200
    assert np.isnan(in_one_scale([found[0], Scaled(jnp.array([jnp.nan]), jnp.int32(0))]).values[1])


@functools.cache
def problem():
    params = oracles.make_params(0, SIZES)
    x, y = oracles.normal(7, (6, SIZES[0])), jnp.arange(6) % 3
    return params, x, y, FISHER.layers(params, x)


def step(tx, *, spoil=False):
    """One step, with NaN for the gradients of wide kernels where they are to be spoiled."""
    params, x, y, _ = problem()

    @jax.jit
    def run(state):
        work = FISHER.value_and_grad(lambda prediction, y: prediction.mean_nll(y))
        _, grads, curvature = work(params, x, targets=y, key=jax.random.key(0))
        if spoil:
            grads = jax.tree.map(lambda v: v * jnp.nan if v.size > 1000 else v, grads)
        return tx.update(grads, state, params, curvature=curvature)

    return run(tx.init(params))


@pytest.mark.parametrize("bound", ["damped", "movement"])
@pytest.mark.parametrize("preset", ["rs_kfac", "b_kfac", "kfac"])
def test_clipped_as_by_the_gradient_which_nothing_reads(x64, preset, bound):
    *_, layers = problem()
    own = dict(inverse="cholesky") if preset == "kfac" else dict(rank=5)
    make = functools.partial(
        getattr(ko, preset), layers, kl_clip=1e-4, bound=bound, **own, **COMMON
    )
    want, dense = step(make())
    got, state = step(make(factored_gradient=True), spoil=True)
    scales = [the_state(x, KLClipState, "test").kl_scale for x in (state, dense)]
    assert 0 < scales[0] < 0.9
    np.testing.assert_allclose(*scales, rtol=1e-6)  # kept in single precision
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9 * np.abs(np.asarray(b)).max())


def test_handed_on_beside_the_update(x64):
    params, x, y, layers = problem()
    block = ko.blocks_of(ko.kronecker("cholesky"))
    tx = ko.scale_by_curvature(layers, block=block, sloped=True, factored_gradient=True)
    plain = ko.scale_by_curvature(layers, block=block)
    got, _ = step(tx)
    want, _ = step(plain)
    assert isinstance(got, ko.Sloped)
    grads = jax.grad(lambda p: oracles.classifier(p, x).mean_nll(y))(params)
    products = jax.tree.map(lambda u, v: jnp.sum(u * v), want, grads)
    found = got.slopes * 2.0**got.exponent
    assert len(found) == len(layers)
    np.testing.assert_allclose(jnp.sum(found), sum(jax.tree.leaves(products)), rtol=1e-10)


def test_not_with_a_coupling():
    *_, layers = problem()
    with pytest.raises(ValueError, match=r"sloped=True with the coupling .*; expected no coupling"):
        ko.scale_by_curvature(
            layers, block=ko.kronecker(), coupling=ko.coarse_correction(), sloped=True
        )
