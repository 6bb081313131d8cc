"""Optax's combinators and wrappers around, before and behind our transformations."""

import dataclasses
from collections import OrderedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import kfac_optax as ko
from tests import helpers as h


def _jit_update(tx, problem, **static):
    """Compiled `(grads, state, params) -> (updates, state)` with the curvature at `params`, without
    branches.
    """
    static = {"refresh": True} | static
    return jax.jit(
        lambda grads, state, params: tx.update(
            grads, state, params, curvature=problem.at(params), **static
        )
    )


def _once(tx, problem, grads, **static):
    """Updates and state of the first step."""
    static = {"refresh": True} | static
    return jax.jit(lambda g, p: tx.update(g, tx.init(p), p, curvature=problem.at(p), **static))(
        grads, problem.params
    )


@pytest.mark.parametrize(
    ("combine", "preset"), [("chain", "kfac"), ("named_chain", "kfac_two_level")]
)
def test_chain_is_its_parts(combine, preset):
    """Every member gets `curvature`, ours uses it; the result is that of the members one after
    another.
    """
    problem = h.plain_problem()
    members = {
        "clip": optax.clip_by_global_norm(0.1),
        "kfac": h.make_tx(preset, problem),
        "trust": optax.scale_by_trust_ratio(),
        "decay": optax.add_decayed_weights(1e-2),
        "sgd": optax.sgd(0.1, momentum=0.9),
    }
    tx = (
        optax.chain(*members.values())
        if combine == "chain"
        else optax.named_chain(*members.items())
    )

    @jax.jit
    def by_hand(updates, states, params):
        new = []
        for (name, member), state in zip(members.items(), states, strict=True):
            extra = {"curvature": problem.at(params), "refresh": True} if name == "kfac" else {}
            updates, after = member.update(updates, state, params, **extra)
            new.append(after)
        return updates, tuple(new)

    update = _jit_update(tx, problem)
    states = jax.jit(lambda p: tuple(member.init(p) for member in members.values()))(problem.params)
    state = states if combine == "chain" else OrderedDict(zip(members, states, strict=True))
    h.assert_same_types(jax.eval_shape(tx.init, problem.params), state)
    for _ in range(2):
        updates, state = update(h.plain_grads(), state, problem.params)
        expected, states = by_hand(h.plain_grads(), states, problem.params)
    h.assert_close(updates, expected)
    h.assert_close(state if combine == "chain" else tuple(state[name] for name in members), states)


def _kernels_only(params):
    """A problem whose only parameters are the kernels; the biases are constants of the model."""
    full = h.plain_problem()

    def predict(kernels, x):
        x = jnp.tanh(h.dense(x, kernels["first"]["w"]) + params["first"]["b"])
        s = h.dense(x, kernels["last"]["w"]) + params["last"]["b"]
        return ko.Categorical(s)

    return h.make_problem(
        predict, {name: {"w": params[name]["w"]} for name in params}, full.x, full.y
    )


def _last_layer_only(params):
    full = h.plain_problem()

    def predict(last, x):
        return h.plain_predict({"first": params["first"]} | last, x)

    return h.make_problem(predict, {"last": params["last"]}, full.x, full.y)


KERNELS = {"first": {"w": True, "b": False}, "last": {"w": True, "b": False}}
# the masked bias belongs to a kernel that is there, the bias that is there to a masked kernel: its
# gradient passes
LAST_LAYER = {"first": {"w": False, "b": True}, "last": {"w": True, "b": True}}


@pytest.mark.parametrize(
    ("preset", "mask", "smaller"),
    [
        ("kfac", KERNELS, _kernels_only),
        ("kfac_two_level", KERNELS, _kernels_only),
        ("kfac_two_level", LAST_LAYER, _last_layer_only),
    ],
    ids=["kernels-kfac", "kernels-two_level", "last_layer-two_level"],
)
def test_masked_is_the_smaller_problem(preset, mask, smaller):
    """A masked bias leaves a layer without bias, a masked layer is gone; what is masked passes
    unchanged.
    """
    problem, grads = h.plain_problem(), h.plain_grads()
    tx = h.make_tx(preset, problem, uncovered="pass")
    updates, state = _once(optax.masked(tx, mask), problem, grads)
    small = smaller(problem.params)
    some = {
        layer: {name: grads[layer][name] for name in part} for layer, part in small.params.items()
    }
    expected, expected_state = _once(h.make_tx(preset, small), small, some)
    h.assert_close(state.inner_state, expected_state, structure=False)
    assert list(optax.tree.get(state, "factors")) == list(optax.tree.get(expected_state, "factors"))
    h.assert_close(updates, {layer: grads[layer] | expected.get(layer, {}) for layer in grads})
    moved = jax.tree.map(lambda e, g: not np.allclose(e, g), expected, some)
    assert all(jax.tree.leaves(moved))


def test_masked_kernel_factor_is_the_plain_second_moment():
    """The factor of a layer whose bias is masked has no row for it: `A = x^T x / N` (the previous
    test, by hand).
    """
    problem = h.plain_problem()
    _, state = _once(
        optax.masked(h.make_tx("kfac", problem), KERNELS), problem, h.plain_grads(), refresh=False
    )
    (factors,) = optax.tree.get(state, "factors").values()
    np.testing.assert_allclose(
        factors.inputs[0], problem.x.T @ problem.x / h.N, rtol=1e-5, atol=1e-6
    )


def test_masking_every_kernel_is_an_error():
    mask = {layer: {"w": False, "b": True} for layer in ("first", "last")}
    tx = optax.masked(h.make_tx("kfac", h.plain_problem()), mask)
    with pytest.raises(
        ValueError,
        match=r"none of the layers first/w, last/w is among the parameters first/b, last/b",
    ):
        jax.eval_shape(tx.init, h.plain_problem().params)


class _Tokens(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.LayerNorm()(nn.Embed(6, 4)(tokens))
        x = nn.tanh(nn.Dense(4)(x))
        return nn.Dense(4)(x)


def test_partition_with_adam():
    """K-FAC for the Dense layers, Adam for Embed and LayerNorm: each as if it were alone."""
    model, tokens, y = _Tokens(), jnp.arange(h.N) % 6, jnp.arange(h.N) % 3
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    problem = h.make_problem(
        lambda p, x: ko.Categorical(model.apply({"params": p}, x)), params, tokens, y
    )
    dense = dataclasses.replace(
        problem.layers, layers=tuple(x for x in problem.layers if x.kind == "dense")
    )
    assert len(dense) == 2 and len(problem.layers) == 4
    labels = jax.tree.map_with_path(
        lambda path, _: "kfac" if path[0].key.startswith("Dense") else "adam", params
    )
    kfac, adam = optax.chain(h.make_tx("kfac_two_level", problem), optax.sgd(0.1)), optax.adam(1e-2)
    tx = optax.partition({"kfac": kfac, "adam": adam}, labels)

    updates, state = _once(tx, problem, params)  # any gradient will do
    alone = optax.chain(h.make_tx("kfac_two_level", problem._replace(layers=dense)), optax.sgd(0.1))
    by_kfac, kfac_state = _once(alone, problem, params)
    by_adam, _ = jax.jit(lambda g: adam.update(g, adam.init(g)))(params)
    h.assert_close(
        updates,
        jax.tree.map(lambda label, k, a: k if label == "kfac" else a, labels, by_kfac, by_adam),
    )
    h.assert_close(optax.tree.get(state, "factors"), optax.tree.get(kfac_state, "factors"))
    assert int(ko.diagnostics(state)["statistics"]) == 1
    assert ko.coarse_fisher(state).names == ("Dense_0", "Dense_1")


def test_map_params_reaches_through_partition_and_masked():
    problem = h.plain_problem()
    labels = {"first": "kfac", "last": "adam"}
    tx = optax.partition(
        {"kfac": h.make_tx("kfac_two_level", problem), "adam": optax.adam(0.1)}, labels
    )
    state = jax.jit(tx.init)(problem.params)
    marks = optax.tree.map_params(
        tx, lambda _: "parameter", state, transform_non_params=lambda _: "other"
    )
    assert set(jax.tree.leaves(marks.inner_states["kfac"])) == {"other"}
    moments = optax.tree.get(marks.inner_states["adam"], "mu")
    assert jax.tree.leaves(moments) == ["parameter", "parameter"]


def test_apply_if_finite():
    """A gradient that is not finite is skipped with the whole state; the steps around it are not
    affected.
    """
    problem = h.plain_problem()
    tx = optax.apply_if_finite(h.make_tx("kfac_two_level", problem), max_consecutive_errors=3)
    update = _jit_update(tx, problem, refresh=None)
    grads = h.plain_grads()
    bad = jax.tree.map(lambda g: g.at[0].set(jnp.nan), grads)
    first, state = update(grads, jax.jit(tx.init)(problem.params), problem.params)
    zeros, skipped = update(bad, state, problem.params)
    assert not any(np.any(u) for u in jax.tree.leaves(zeros))
    h.assert_equal(skipped.inner_state, state.inner_state)
    assert int(skipped.total_notfinite) == 1
    again, state = update(grads, skipped, problem.params)
    assert int(optax.tree.get(state, "kfac_count")) == 2
    h.assert_close(again, first)  # same gradient, parameters and factors
    assert optax.tree.norm(again) > 0


def test_apply_if_finite_lets_a_bad_batch_pass_and_we_skip_it():
    """Optax looks at gradients only; a batch with NaN under finite gradients is dropped, and
    counted, by us.
    """
    problem = h.plain_problem()
    tx = optax.apply_if_finite(h.make_tx("kfac_two_level", problem), max_consecutive_errors=3)
    update = jax.jit(
        lambda grads, state, x: tx.update(
            grads,
            state,
            problem.params,
            curvature=problem.estimator.at(problem.params, x),
            refresh=True,
        )
    )
    grads = h.plain_grads()
    first, good = update(grads, jax.jit(tx.init)(problem.params), problem.x)
    second, state = update(grads, good, problem.x.at[0, 0].set(jnp.nan))
    h.assert_close(second, first)
    h.assert_equal(optax.tree.get(state, "factors"), optax.tree.get(good, "factors"))
    assert int(ko.diagnostics(state)["skipped_statistics"]) == 1
    assert int(ko.diagnostics(state)["statistics"]) == 1


def test_schedule_free():
    """The base sees gradient and curvature at `y`, the parameters passed to `update`; `z` moves by
    its update.
    """
    problem, rate = h.plain_problem(), 0.1
    base = optax.chain(h.make_tx("kfac_two_level", problem), optax.sgd(rate))
    tx = contrib.schedule_free(base, learning_rate=rate, b1=0.9)
    update, base_update = _jit_update(tx, problem), _jit_update(base, problem)
    y, z = problem.params, problem.params
    state, base_state = jax.jit(tx.init)(y), jax.jit(base.init)(y)
    for _ in range(3):
        grads = jax.jit(problem.grad)(y)
        moved, base_state = base_update(grads, base_state, y)
        z = optax.apply_updates(z, moved)
        updates, state = update(grads, state, y)
        y = optax.apply_updates(y, updates)
        h.assert_close(state.z, z)
        h.assert_close(
            optax.tree.get(state.base_optimizer_state, "factors"),
            optax.tree.get(base_state, "factors"),
        )
    loss = jax.jit(problem.loss)
    assert loss(contrib.schedule_free_eval_params(state, y)) < loss(problem.params)


def test_lookahead():
    """Lookahead hands no extra argument on: that is a clear error, and binding the curvature in the
    step works.
    """
    problem = h.plain_problem()
    tx = h.make_tx("kfac_two_level", problem)
    params = optax.LookaheadParams.init_synced(problem.params)
    plain = optax.with_extra_args_support(optax.lookahead(tx, sync_period=2, slow_step_size=0.5))
    line = r"\n    updates, .* = tx\.update\(.*curvature=fisher\.at\(.*key=key\)\)\n"
    with pytest.raises(ValueError, match="got no `curvature`(.|\n)*" + line):
        jax.eval_shape(
            lambda p: plain.update(p.fast, plain.init(p), p, curvature=problem.at(p.fast)), params
        )

    @jax.jit
    def step(params, state):
        def update(updates, state, fast):
            return tx.update(updates, state, fast, curvature=problem.at(fast), refresh=True)

        bound = optax.chain(optax.GradientTransformation(tx.init, update), optax.scale(-0.1))
        ahead = optax.lookahead(bound, sync_period=2, slow_step_size=0.5)
        state = ahead.init(params) if state is None else state
        updates, state = ahead.update(problem.grad(params.fast), state, params)
        return optax.apply_updates(params, updates), state

    params, state = step(params, None)
    params, state = step(params, state)
    fast, own = problem.params, h.initial_state("kfac_two_level")
    direct = jax.jit(lambda *args: h.make_step(tx, problem)(*args, refresh=True))
    for _ in range(2):
        fast, own, _ = direct(fast, own)
    middle = jax.tree.map(lambda a, b: (a + b) / 2, problem.params, fast)
    h.assert_close(params.slow, middle)
    h.assert_close(params.fast, middle)
    h.assert_close(state.fast_state, own, structure=False)


def test_conditionally_transform():
    """On steps that the condition leaves out the gradient passes and our state stands still."""
    problem = h.plain_problem()
    tx = optax.conditionally_transform(
        h.make_tx("kfac_two_level", problem), lambda step: step % 2 == 0
    )
    update = _jit_update(tx, problem)
    grads = h.plain_grads()
    state, seen = jax.jit(tx.init)(problem.params), []
    for _ in range(4):
        updates, state = update(grads, state, problem.params)
        seen.append(updates)
    h.assert_equal((seen[1], seen[3]), (grads, grads))
    h.assert_close(seen[0], jax.tree.map(lambda u: u[0], h.reference_run("kfac_two_level")[2]))
    assert int(optax.tree.get(state, "kfac_count")) == 2
