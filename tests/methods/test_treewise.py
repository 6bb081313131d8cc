"""What windows, diagonals and posteriors share: leaves of all kinds, bad batches, Optax's wrappers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from tests import helpers as h
from tests.methods import gradient_cases as c

MAKE = {
    "ggt": lambda: ko.ggt(window=3),
    "mfac": lambda: ko.mfac(window=3, damping=0.1),
    "tonga": lambda: ko.tonga(rank=1, block=2),
    "psgd_kron": lambda: ko.psgd_kron(fit_probability=1.0),
    "psgd_lra": lambda: ko.psgd_lra(rank=2, fit_probability=1.0),
    "adahessian": lambda: ko.adahessian(curvature_every=2),
    "esgd": lambda: ko.esgd(curvature_every=2),
    "vadam": lambda: ko.vadam(),
    "vogn": lambda: ko.vogn(),
}
every = pytest.mark.parametrize("name", MAKE)


@functools.cache
def steps(dtype=jnp.float32):
    return tuple(c.tree_of_all_kinds(s, dtype) for s in range(4))


def beside(gradient):
    """Extra arguments of an update: a Hessian that is diagonal, and two examples."""
    hvp = lambda v: jax.tree.map(lambda x: (2 * x).astype(x.dtype), v)
    twice = jax.tree.map(lambda g: jnp.stack([g + 1, g - 1]), gradient)
    return {"hvp": hvp, "per_example_grads": twice}


def compiled(name, tx):
    extra = name not in ("mfac",)  # whose rows are those of the batch, here

    @jax.jit
    def step(gradient, state):
        params = jax.tree.map(jnp.zeros_like, gradient)
        return tx.update(gradient, state, params, **(beside(gradient) if extra else {}))

    return tx, step


@functools.cache
def usual(name):
    return compiled(name, MAKE[name]())


def run(name, gradients, tx=None):
    tx, step = usual(name) if tx is None else compiled(name, tx)
    state, out = tx.init(jax.tree.map(jnp.zeros_like, gradients[0])), []
    for gradient in gradients:
        update, state = step(gradient, state)
        out.append(update)
    return out, state


@functools.cache
def plain(name):
    return run(name, steps())


@every
def test_every_kind_of_leaf_has_an_update(name):
    updates, state = plain(name)
    for update in updates:
        for leaf, like in zip(jax.tree.leaves(update), jax.tree.leaves(steps()[0]), strict=True):
            assert leaf.shape == like.shape
            assert leaf.dtype == like.dtype
            assert np.isfinite(leaf).all()
            assert leaf.size == 0 or np.abs(leaf).max() > 0
    start = MAKE[name]().init(steps()[0])
    h.assert_same_types(start, state)
    assert not any(x.weak_type for x in jax.tree.leaves(start))


@pytest.mark.parametrize("name", ["tonga", "adahessian", "vogn"])
def test_narrow_gradients_have_a_wide_state(name):
    updates, state = run(name, steps(jnp.bfloat16))
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    floats = {x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert floats == {jnp.dtype(jnp.float32)}


@every
def test_bad_batch_is_as_if_it_had_not_been(name):
    bad = np.inf if name in ("ggt", "vadam") else np.nan
    worse = jax.tree.map(lambda x: x, steps()[1]) | {"vector": steps()[1]["vector"].at[0].set(bad)}
    updates, state = run(name, [worse, steps()[0], worse, *steps()[1:]])
    expected, clean = plain(name)
    for zero in (updates[0], updates[2]):
        h.assert_equal(zero, jax.tree.map(jnp.zeros_like, zero))
    h.assert_equal([updates[i] for i in (1, 3, 4, 5)], expected)
    h.assert_equal(state._replace(counts=clean.counts), clean)
    assert int(state.counts.skipped_gradients) == 2
    assert "2 gradients were not finite" in ko.problems(state)[0]


@every
def test_gradients_that_begin_late_are_as_good(name):
    """Twenty of zeros move nothing, and what follows is finite and no longer than a few steps."""
    nothing = jax.tree.map(jnp.zeros_like, steps()[0])
    updates, state = run(name, [nothing] * 20 + list(steps()))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
    h.assert_equal(updates[:20], [nothing] * 20)
    size = optax.tree.norm(updates[-1])
    assert 0 < size < 20 * optax.tree.norm(plain(name)[0][-1])


@pytest.mark.parametrize("name", ["ggt", "mfac", "tonga", "psgd_kron", "psgd_lra", "vadam"])
@pytest.mark.parametrize("at", [0, 2])
def test_gradients_too_large_to_square_are_as_if_they_had_not_been(name, at):
    huge = jax.tree.map(lambda x: 1e25 * x, steps()[1])
    updates, state = run(name, [*steps()[:at], huge, *steps()[at:]])
    h.assert_equal(updates[at], jax.tree.map(jnp.zeros_like, huge))
    h.assert_equal(state._replace(counts=plain(name)[1].counts), plain(name)[1])
    counts = state.counts
    assert int(counts.skipped_statistics + counts.non_finite_updates) > 0


@every
@pytest.mark.parametrize("leaf", [jnp.ones(2, jnp.complex64), jnp.ones(2, jnp.int32)])
def test_leaves_that_are_not_real_raise_with_their_name(name, leaf):
    with pytest.raises(TypeError, match="'inner/odd'"):
        MAKE[name]().init({"inner": {"odd": leaf}, "w": jnp.ones((2, 2))})


@pytest.mark.parametrize("name", ["ggt", "esgd", "vogn"])
def test_masked_leaves_have_no_part(name):
    mask = {leaf: leaf in ("dense", "conv") for leaf in steps()[0]}
    kept = [{n: g[n] for n, mine in mask.items() if mine} for g in steps()]
    alone, _ = run(name, kept)

    def drop(tree):
        return {n: x for n, x in tree.items() if mask[n]}

    tx = optax.masked(MAKE[name](), mask)
    params = jax.tree.map(jnp.zeros_like, steps()[0])

    @jax.jit
    def step(gradient, state):
        extra = beside(gradient)
        rows = extra["per_example_grads"]
        masked = {n: x if mask[n] else optax.MaskedNode() for n, x in rows.items()}
        return tx.update(gradient, state, params, **(extra | {"per_example_grads": masked}))

    state = tx.init(params)
    for gradient, expected in zip(steps(), alone, strict=True):
        update, state = step(gradient, state)
        h.assert_close(drop(update), expected, rtol=1e-4, atol=1e-5)


@every
def test_map_params_keeps_the_structure(name):
    tx = MAKE[name]()
    state = tx.init(steps()[0])
    h.assert_equal(optax.tree.map_params(tx, lambda x: x, state), state)


@every
def test_nothing_to_do(name):
    tx = MAKE[name]()
    for tree in ({}, {"none": None}):
        assert tx.update(tree, tx.init(tree), tree)[0] == tree
    empty = {"e": jnp.zeros((0, 3))}
    extra = beside(empty) if name != "mfac" else {}
    update, _ = tx.update(empty, tx.init(empty), empty, **extra)
    assert update["e"].shape == (0, 3)


def test_schedules_follow_the_count_and_nonsense_is_counted():
    def decay(count):
        return jnp.where(count == 2, jnp.nan, 0.5)

    scheduled, state = run("ggt", steps(), ko.ggt(window=3, b1=decay))
    fixed, _ = run("ggt", steps(), ko.ggt(window=3, b1=0.5))
    h.assert_close(scheduled, fixed, rtol=1e-5)
    assert "1 values of b1 made no sense" in ko.problems(state)[0]


def test_many_leaves_are_one_vector():
    """As one stacked leaf has it, in the dtype of each leaf; a bad gradient is left out of both."""
    gradients = [jnp.asarray(g, jnp.float32) for g in c.draws(5, 10, 2, 3, steps=3)]
    gradients[1] = gradients[1].at[2, 0, 0].set(jnp.inf)
    dtypes = [jnp.float32, jnp.bfloat16] * 5
    stacked = [
        jnp.stack([x.astype(t).astype("float32") for x, t in zip(g, dtypes)]) for g in gradients
    ]
    apart = [[x.astype(t) for x, t in zip(g, dtypes)] for g in gradients]
    updates, state = c.run(ko.ggt(window=2), apart)
    expected, other = c.run(ko.ggt(window=2), stacked)
    h.assert_close(state.held.rows, other.held.rows, rtol=1e-6)
    for one, two in zip(updates, expected, strict=True):
        for x, y, dtype in zip(one, two, dtypes, strict=True):
            assert x.dtype == dtype
            h.assert_close(x.astype(jnp.float32), y.astype(dtype).astype(jnp.float32), rtol=1e-5)
