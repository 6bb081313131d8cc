"""What Shampoo and its relatives share: leaves of all kinds, bad batches, Optax's wrappers and JAX's transformations."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from tests import helpers as h
from tests.methods import gradient_cases as c

every = pytest.mark.parametrize("name", c.SCALE_BY)
# relatives of Shampoo run through the same functions, so that one stands for all
one_of_a_kind = pytest.mark.parametrize("name", ["shampoo", "soap", "eva_s"])


@functools.cache
def steps(dtype=jnp.float32):
    return tuple(c.tree_of_all_kinds(s, dtype) for s in range(4))


@functools.cache
def plain(name):
    """Updates of the default transformation, shared by the tests of one process."""
    return c.run_of_two(name, steps())


@every
def test_every_kind_of_leaf_has_an_update(name):
    for update in plain(name)[0][1:]:  # the first of SOAP finds the bases
        for leaf, like in zip(jax.tree.leaves(update), jax.tree.leaves(steps()[0]), strict=True):
            assert leaf.shape == like.shape
            assert leaf.dtype == like.dtype
            assert np.isfinite(leaf).all()
            assert leaf.size == 0 or np.abs(leaf).max() > 0


@every
def test_state_is_of_strong_types_and_stays_so(name):
    tx = c.SCALE_BY[name](inverse_every=2)
    start = tx.init(steps()[0])
    h.assert_same_types(start, plain(name)[1])
    assert not any(x.weak_type for x in jax.tree.leaves(start))


@every
def test_narrow_gradients_have_a_wide_state(name):
    dtype = jnp.float16 if name in ("soap", "jorge") else jnp.bfloat16
    updates, state = c.run_of_two(name, steps(dtype))
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    floats = {x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert floats == {jnp.dtype(jnp.float32)}
    wide = [jax.tree.map(lambda x: x.astype(jnp.float32), g) for g in steps(dtype)]
    expected, _ = c.run_of_two(name, wide)
    narrowed = jax.tree.map(lambda x: x.astype(dtype), expected)
    h.assert_close(updates, narrowed, rtol=2e-2, atol=1e-3)


@one_of_a_kind
def test_gradients_narrower_than_parameters(name):
    tx = c.SCALE_BY[name](inverse_every=2)
    narrow = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), g) for g in steps()]
    updates, _ = c.run(tx, narrow, params=steps()[0])
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}


@every
def test_bad_batch_is_as_if_it_had_not_been(name):
    bad = np.inf if name in ("shampoo", "tnt") else np.nan
    worse = jax.tree.map(lambda x: x, steps()[1]) | {"vector": steps()[1]["vector"].at[0].set(bad)}
    gradients = [worse, steps()[0], worse, *steps()[1:]]
    updates, state = c.run_of_two(name, gradients)
    expected, clean = plain(name)
    for zero in (updates[0], updates[2]):
        h.assert_equal(zero, jax.tree.map(jnp.zeros_like, zero))
    h.assert_equal([updates[i] for i in (1, 3, 4, 5)], expected)
    h.assert_equal(state._replace(counts=clean.counts), clean)
    assert int(state.counts.skipped_gradients) == 2
    assert "2 gradients were not finite" in ko.problems(state)[0]


@every
@pytest.mark.parametrize("at", [0, 1])
def test_gradients_too_large_to_square_are_soon_forgotten(name, at):
    """Its momentum apart, if it has one: no average stays at infinity."""
    huge = jax.tree.map(lambda x: 1e25 * x, steps()[1])
    gradients = [*steps()[:at], huge, *steps()[at:]]
    updates, state = c.run_of_two(name, gradients)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
    sizes = [jnp.linalg.norm(x) for x in jax.tree.leaves(updates[-1]) if x.size]
    assert min(sizes) > 1e-2
    if name not in ("distributed_shampoo", "jorge"):  # those go on by momentum
        assert max(sizes) < 1e4


@every
def test_gradients_that_begin_late_are_as_good(name):
    """Twenty of zeros move nothing, and what follows is finite and no longer than a few steps."""
    nothing = jax.tree.map(jnp.zeros_like, steps()[0])
    updates, state = c.run_of_two(name, [nothing] * 20 + list(steps()))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
    h.assert_equal(updates[:20], [nothing] * 20)
    size = optax.tree.norm(updates[-1])
    assert 0 < size < 20 * optax.tree.norm(plain(name)[0][-1])


@pytest.mark.parametrize("factor", [jnp.nan, 1e25])
def test_bad_batch_does_not_reach_graft_and_momentum(factor):
    """One whose squares overflow in Adam is as bad as one that is not finite."""
    words = dict(graft="adam", momentum=0.9, vectors="diagonal")
    tx = ko.scale_by_shampoo(**words)
    gradients = [{"vector": tree["vector"]} for tree in steps()]
    worse = jax.tree.map(lambda x: x * factor, gradients[0])
    expected, _ = c.run(tx, gradients)
    updates, state = c.run(tx, [*gradients[:2], worse, *gradients[2:]])
    h.assert_equal([updates[i] for i in (0, 1, 3, 4)], expected)
    h.assert_equal(updates[2], jax.tree.map(jnp.zeros_like, worse))
    assert int(state.counts.skipped_gradients + state.counts.non_finite_updates) == 1


@pytest.mark.parametrize("name", ["distributed_shampoo", "jorge"])
def test_no_momentum_overflows(name):
    """Also that of the two which a step does not use."""
    largest = jnp.full((2, 2), 3e38)
    _, state = c.run_of_two(name, [largest] * 3)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


@one_of_a_kind
def test_equal_shapes_together_are_as_one_by_one(name):
    trees = [
        {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}
        for a, b in zip(c.draws(1, 3, 4), c.draws(2, 3, 4), strict=True)
    ]
    together, state = c.run_of_two(name, trees)
    assert jax.tree.leaves(state[1])[0].shape[0] == 2
    for leaf in "ab":
        alone, _ = c.run(c.SCALE_BY[name](inverse_every=2), [tree[leaf] for tree in trees])
        h.assert_close([tree[leaf] for tree in together], alone, rtol=1e-4)


@every
def test_stacked_leaves_are_layers_of_their_own(name):
    stacked = [jnp.asarray(g, jnp.float32) for g in c.draws(3, 2, 3, 4)]
    tx = c.SCALE_BY[name](inverse_every=2, stacked=lambda path: 1 if path == "scanned" else 0)
    together, _ = c.run(tx, [{"scanned": g} for g in stacked])
    apart, _ = c.run_of_two(name, [{"a": g[0], "b": g[1]} for g in stacked])
    for one, two in zip(together, apart, strict=True):
        h.assert_close(one["scanned"], jnp.stack([two["a"], two["b"]]), rtol=1e-4)
    with pytest.raises(ValueError, match="stacked"):
        tx.init({"scanned": jnp.float32(1.0)})


def test_every_layer_of_a_stacked_leaf_has_the_norm_of_its_own():
    """Cut into pieces or not: a layer is one leaf, whatever the number of its problems."""
    scales = jnp.array([1.0, 10.0])[:, None, None]
    gradient = scales * jnp.asarray(c.draws(3, 2, 3, 4, steps=1)[0], jnp.float32)
    for max_dim in (8, 2):
        tx = ko.scale_by_shampoo(graft="sgd", stacked=lambda path: 1, max_dim=max_dim)
        (update,), _ = c.run(tx, [gradient])
        sizes = [np.linalg.norm(x, axis=(1, 2)) for x in (update, gradient)]
        np.testing.assert_allclose(*sizes, rtol=1e-5)


@every
@pytest.mark.parametrize("leaf", [jnp.ones(2, jnp.complex64), jnp.ones(2, jnp.int32)])
def test_leaves_that_are_not_real_raise_with_their_name(name, leaf):
    with pytest.raises(TypeError, match="'inner/odd'"):
        c.SCALE_BY[name]().init({"inner": {"odd": leaf}, "w": jnp.ones((2, 2))})


@one_of_a_kind
def test_scan_and_donation(name):
    tx = c.SCALE_BY[name](inverse_every=2)
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *steps())

    @functools.partial(jax.jit, donate_argnums=0)
    def whole(state, gradients):
        return jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], state, gradients)

    _, updates = whole(tx.init(steps()[0]), stacked)
    expected = jax.tree.map(lambda *xs: jnp.stack(xs), *plain(name)[0])
    h.assert_close(updates, expected, rtol=1e-3, atol=1e-4)


@one_of_a_kind
def test_masked_and_partition(name):
    mask = {leaf: leaf in ("dense", "conv") for leaf in steps()[0]}
    masked, _ = c.run(optax.masked(c.SCALE_BY[name](inverse_every=2), mask), steps())
    labels = {leaf: "mine" if mine else "rest" for leaf, mine in mask.items()}
    split = optax.partition(
        {"mine": c.SCALE_BY[name](inverse_every=2), "rest": optax.sgd(1.0)}, labels
    )
    divided, _ = c.run(split, steps())
    for t, gradient in enumerate(steps()):
        for leaf, mine in mask.items():
            if mine:
                h.assert_close(masked[t][leaf], plain(name)[0][t][leaf], rtol=1e-4)
                h.assert_close(divided[t][leaf], plain(name)[0][t][leaf], rtol=1e-4)
            else:
                h.assert_equal(masked[t][leaf], gradient[leaf])
                h.assert_equal(divided[t][leaf], -gradient[leaf])


@one_of_a_kind
def test_multi_steps(name):
    twice = [gradient for gradient in steps() for _ in range(2)]
    tx = optax.MultiSteps(c.SCALE_BY[name](inverse_every=2), every_k_schedule=2)
    updates, _ = c.run(tx, twice)
    h.assert_close(updates[1::2], plain(name)[0], rtol=1e-3, atol=1e-4)


@every
def test_map_params_finds_no_parameter_in_the_state(name):
    tx = c.SCALE_BY[name]()
    state = tx.init(steps()[0])
    h.assert_equal(optax.tree.map_params(tx, lambda x: x + 1, state), state)


@pytest.mark.parametrize("preset", [ko.shampoo, ko.soap, ko.eva_s])
def test_hyperparameters_are_injected(preset):
    gradients = [{n: tree[n] for n in ("dense", "vector")} for tree in steps()]
    tx = optax.inject_hyperparams(preset)(learning_rate=0.1)  # sizes stay Python numbers
    updates, state = c.run(tx, gradients)
    h.assert_close(updates, c.run(preset(learning_rate=0.1), gradients)[0], rtol=1e-3, atol=1e-5)
    state.hyperparams["learning_rate"] = jnp.float32(0.0)
    update, _ = jax.jit(tx.update)(gradients[0], state, gradients[0])
    h.assert_equal(jax.tree.map(jnp.abs, update), jax.tree.map(jnp.zeros_like, update))


@pytest.mark.parametrize("preset", [ko.shampoo, ko.soap, ko.eva_s])
def test_a_rate_that_is_an_array_or_a_schedule_widens_nothing(preset):
    narrow = [{"vector": tree["vector"].astype(jnp.bfloat16)} for tree in steps()]
    for rate in (jnp.float32(0.1), optax.constant_schedule(0.1)):
        tx = preset(rate, weight_decay=jnp.float32(0.1))
        updates, _ = jax.eval_shape(tx.update, narrow[0], tx.init(narrow[0]), narrow[0])
        assert updates["vector"].dtype == jnp.bfloat16


@one_of_a_kind
def test_schedules_follow_the_count_and_nonsense_is_counted(name):
    gradients = [{n: tree[n] for n in ("dense", "vector")} for tree in steps()]

    def decay(count):
        return jnp.where(count == 2, jnp.nan, 0.5)

    scheduled, state = c.run(c.SCALE_BY[name](inverse_every=2, decay=decay), gradients)
    fixed, _ = c.run(c.SCALE_BY[name](inverse_every=2, decay=0.5), gradients)
    h.assert_close(scheduled, fixed, rtol=1e-4)
    assert "1 values of decay made no sense" in ko.problems(state)[0]


@every
def test_nothing_to_precondition(name):
    tx = c.SCALE_BY[name]()
    for tree in ({}, {"none": None}):
        assert tx.update(tree, tx.init(tree))[0] == tree
    empty = {"e": jnp.zeros((0, 3))}
    update, _ = tx.update(empty, tx.init(empty))
    assert update["e"].shape == (0, 3)


def test_a_deep_net_of_equal_layers_is_a_stack_of_them():
    """Leaves are cut out of the stack at places that are known only when the step runs."""
    gradients = [jnp.asarray(g, jnp.float32) for g in c.draws(5, 10, 3, 4, steps=3)]
    gradients[1] = gradients[1].at[2, 0, 0].set(jnp.nan)
    apart = [{f"layer_{i}": layer for i, layer in enumerate(g)} for g in gradients]
    updates, _ = c.run(ko.scale_by_shampoo(graft="sgd"), apart)
    expected, _ = c.run(ko.scale_by_shampoo(graft="sgd", stacked=lambda path: 1), gradients)
    for one, two in zip(updates, expected, strict=True):
        h.assert_close(jnp.stack([one[f"layer_{i}"] for i in range(10)]), two, rtol=1e-5)
    h.assert_equal(updates[1], jax.tree.map(jnp.zeros_like, updates[1]))


DEEP = {
    "shampoo": ko.scale_by_shampoo,
    "soap": ko.scale_by_soap,
    "eva_s": lambda: ko.eva_s(0.1),
    "ggt": lambda: ko.ggt(window=2),
}


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="kernels of the CPU's compiler")
def test_a_deep_net_has_no_more_kernels_than_a_shallow_one(name):
    """Kernels that differ in nothing are compiled once, so that depth costs no time to compile."""

    def kernels(depth):
        params = {f"layer_{i:02d}": jnp.ones((3, 4)) for i in range(depth)}
        tx = DEEP[name]()
        text = jax.jit(tx.update).lower(params, tx.init(params)).compile().as_text()
        bodies = re.findall(r"^%fused_computation\S* \(.*?^}", text, re.DOTALL | re.MULTILINE)
        # without names, numbers of instructions, and where in the program they come from
        plain = [re.sub(r"%[\w.-]+|metadata=\{.*?\}|param_\d+\S*", "", body) for body in bodies]
        return len({body.replace(f"[{depth}", "[n") for body in plain}), len(bodies)

    shallow, deep = kernels(9), kernels(27)
    assert deep[1] >= shallow[1] + 18  # one for every leaf
    assert deep[0] <= shallow[0] + 2
