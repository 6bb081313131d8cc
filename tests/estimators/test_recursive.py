"""Recursions through chains of layers: factors of KFRA, moduli of the backpropagated metric."""

import copy

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax.capture.chain import chain_of
from kfac_optax.capture.layers import trace
from tests import oracles

SIZES = (3, 4, 3, 2)


def factors(make, params, x, block=None, predict=oracles.classifier):
    """Statistics of all layers in order of execution, compiled."""
    estimator = make(predict)
    plan = oracles.plan(estimator.layers(params, x), block=block)
    measured = jax.jit(lambda p, x: estimator.at(p, x).statistics(plan)[0])(params, x)
    return [jax.tree.map(lambda s: np.asarray(s[0]), mine) for mine in measured]


def columns(params, x):
    """Columns of the softmax Fisher at the output, `[C, N, C]`."""
    return oracles.softmax_columns(oracles.forward(params, x, tapped=False)[0])


def test_of_one_example_it_is_the_exact_block(x64):
    params, x = oracles.make_params(0, SIZES), oracles.normal(1, (1, 3))
    a, g = oracles.per_example(params, x, columns(params, x))
    dense = oracles.block_diagonal(oracles.exact_fisher(a, g), oracles.block_sizes(a, g))
    start = 0
    for recursive, exact in zip(*(factors(f, params, x) for f in (ko.recursive_ggn, ko.ggn))):
        for x_got, x_want in zip(recursive, exact, strict=True):
            np.testing.assert_allclose(x_got, x_want, rtol=1e-11, atol=1e-14)
        block = np.kron(recursive.inputs, recursive.outputs)
        want = dense[start : (start := start + len(block)), start - len(block) : start]
        np.testing.assert_allclose(block, want, rtol=1e-10, atol=1e-13)


def test_of_a_linear_chain_it_is_exact_on_any_batch(x64):
    params, x = oracles.make_params(0, SIZES), oracles.normal(1, (6, 3))

    def linear(params, x):
        return oracles.regressor(params, x, lambda s: s)

    seeds = jnp.broadcast_to(jnp.eye(2)[:, None], (2, 6, 2))
    a, g = oracles.per_example(params, x, seeds, activation=lambda s: s)
    cross_a, cross_g = oracles.cross_factors(a, g)
    for i, got in enumerate(factors(ko.recursive_ggn, params, x, predict=linear)):
        np.testing.assert_allclose(got.inputs, cross_a[i][i], rtol=1e-11)
        np.testing.assert_allclose(got.outputs, cross_g[i][i], rtol=1e-11)
    # and the product of both is the exact block, since the output side does not depend on examples
    block = oracles.exact_fisher(a, g)[: 4 * 4, : 4 * 4]
    np.testing.assert_allclose(np.kron(cross_a[0][0], cross_g[0][0]), block, rtol=1e-10, atol=1e-12)


def by_hand(params, x):
    """Factors and moduli of the recursions, in NumPy."""
    _, inputs = oracles.forward(params, x, tapped=False)
    kernels = [np.asarray(layer["kernel"]) for layer in params.values()]
    slopes = [1 - np.asarray(a) ** 2 for a in inputs[1:]]
    c = np.asarray(columns(params, x))
    outputs, moduli = [np.einsum("cni,cnj->ij", c, c) / len(x)], [(c**2).sum(0)]
    for kernel, slope in zip(kernels[:0:-1], slopes[::-1]):
        back = kernel @ outputs[0] @ kernel.T
        outputs.insert(0, back * (slope.T @ slope / len(x)))
        moduli.insert(0, slope**2 * (moduli[0] @ (kernel**2).T))
    return outputs, moduli


def test_the_recursion_is_that_of_the_definition(x64):
    params, x = oracles.make_params(0, SIZES), oracles.normal(1, (5, 3))
    outputs, moduli = by_hand(params, x)
    recursive, exact = factors(ko.recursive_ggn, params, x), factors(ko.ggn, params, x)
    for got, full, want in zip(recursive, exact, outputs, strict=True):
        np.testing.assert_allclose(got.outputs, want, rtol=1e-11)
        np.testing.assert_allclose(got.inputs, full.inputs, rtol=1e-12)
    assert not np.allclose(recursive[0].outputs, exact[0].outputs, rtol=1e-2)
    metric = factors(ko.backpropagated_metric, params, x, ko.unit_block())
    _, inputs = oracles.forward(params, x, tapped=False)
    for got, modulus, a in zip(metric, moduli, inputs, strict=True):
        ones = np.concatenate([a, np.ones((5, 1))], 1)
        want = np.einsum("nk,ni,nj->kij", modulus, ones, ones) / 5
        np.testing.assert_allclose(got, want, rtol=1e-11)


def test_the_metric_of_one_hidden_layer_and_one_output_is_exact(x64):
    params, x = oracles.make_params(0, (3, 4, 1)), oracles.normal(1, (5, 3))

    def binary(params, x):
        return ko.Bernoulli(oracles.forward(params, x)[0][:, 0])

    pair = (ko.backpropagated_metric, ko.ggn)
    got, want = (factors(f, params, x, ko.unit_block(), binary) for f in pair)
    for mine, exact in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, exact, rtol=1e-11)


def test_examples_of_weight_zero_are_dropped_whatever_they_hold(x64):
    params, x = oracles.make_params(0, SIZES), oracles.normal(1, (3, 3))
    padded = jnp.concatenate([x, jnp.full((2, 3), jnp.nan)])
    weights = jnp.array([1.0, 1, 1, 0, 0])

    def masked(params, x):
        return ko.Categorical(oracles.forward(params, x)[0], weights=weights)

    for make, block in ((ko.recursive_ggn, None), (ko.backpropagated_metric, ko.unit_block())):
        got, want = factors(make, params, padded, block, masked), factors(make, params, x, block)
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-14)


def test_a_copy_of_an_estimator_measures_the_same(x64):
    params, x = oracles.make_params(0, SIZES), oracles.normal(1, (3, 3))
    for make, block in ((ko.recursive_ggn, None), (ko.backpropagated_metric, ko.unit_block())):

        def copied(model, make=make):
            return copy.deepcopy(make(model))

        got, want = factors(copied, params, x, block), factors(make, params, x, block)
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(one, other)


def test_parts_of_a_batch_have_the_factors_of_all(x64):
    """The recursion is not linear: it has to go on from the mean over devices."""
    params, x = oracles.make_params(0, SIZES), oracles.normal(1, (4, 3))
    estimator = ko.recursive_ggn(oracles.classifier)
    plan = oracles.plan(estimator.layers(params, x))._replace(axis_name="devices")
    parts = jax.vmap(lambda x: estimator.at(params, x).statistics(plan)[0], axis_name="devices")
    got = jax.tree.map(lambda s: s[0, 0], jax.jit(parts)(x.reshape(2, 2, 3)))
    for mine, want in zip(got, factors(ko.recursive_ggn, params, x), strict=True):
        np.testing.assert_allclose(mine.outputs, want.outputs, rtol=1e-11)


def test_scaling_and_shifting_an_activation_changes_no_step_without_damping(x64):
    """`f -> 2 f + 1` with weights behind it that make up for that."""
    params, x = oracles.make_params(0, (3, 4, 2)), oracles.normal(1, (9, 3))
    other = jax.tree.map(lambda w: w, params)
    kernel = params["layer1"]["kernel"] / 2
    other["layer1"] = {"kernel": kernel, "bias": params["layer1"]["bias"] - kernel.sum(0)}

    def steps(params, activation, damping):
        def model(params, x):
            return oracles.regressor(params, x, activation)

        estimator = ko.backpropagated_metric(model)
        tx = ko.unitwise_natural(
            estimator.layers(params, x),
            damping=damping,
            curvature_every=1,
            inverse_every=1,
            decay=0.0,
        )
        state = tx.init(params)
        for _ in range(2):
            grads = jax.grad(lambda p: model(p, x).mean_nll(jnp.ones((9, 2))))(params)
            updates, state = tx.update(grads, state, params, curvature=estimator.at(params, x))
            params = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
        return model(params, x).natural[0]

    run = jax.jit(steps, static_argnums=1)
    for damping, bound in ((0.0, None), (1e-2, 1e-3)):
        one = run(params, jnp.tanh, damping)
        two = run(other, lambda s: 2 * jnp.tanh(s) + 1, damping)
        off = float(np.abs(one - two).max())
        assert off < 1e-8 if bound is None else off > bound


@pytest.mark.parametrize("f", [nn.relu, nn.gelu, lambda s: jnp.where(s > 0, s, 0.1 * s)])
def test_slopes_of_activations_are_their_derivatives(f):
    w, x = jnp.eye(3), oracles.normal(0, (4, 3))

    def model(p, x):
        return jax.jit(f)(x @ p["v"]) @ p["w"]

    chain = chain_of("here", trace(model, {"v": w, "w": w}, (x,), "here"), [w, w, x])
    want = jax.vmap(jax.vmap(jax.grad(f)))(x)
    np.testing.assert_allclose(chain.slopes[0], want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(chain.outputs[0], f(x), rtol=1e-5, atol=1e-6)


def dense(p, x):
    return ko.tap_dense(x @ p, x, p)


MODELS = {
    "softmax": (lambda p, x: dense(p["b"], jax.nn.softmax(dense(p["a"], x))), "mixes entries"),
    "skip": (
        lambda p, x: dense(p["b"], (h := jnp.tanh(dense(p["a"], x)))) + h,
        "the output of layer 'a' reaches the prediction past the layers",
    ),
    "two inputs": (
        lambda p, x: dense(p["c"], dense(p["b"], (h := jnp.tanh(dense(p["a"], x)))) + h),
        r"layer 'c' sees outputs of 'a', 'b', not the output of 'b' alone",
    ),
    "side by side": (
        lambda p, x: dense(p["a"], x) + dense(p["b"], x),
        "layer 'b' sees nothing before it",
    ),
    "tied": (lambda p, x: dense(p["a"], jnp.tanh(dense(p["a"], x))), "layer 'a' runs 2 times"),
    "positions": (
        lambda p, x: dense(p["a"], jnp.stack([x, x], 1)).sum(1),
        r"layer 'a' has rows \[4, 2\]",
    ),
    "scale": (lambda p, x: dense(p["a"], x) * p["s"], "is of kind 'scale_shift'"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_are_no_chain_are_refused_by_name(name):
    model, message = MODELS[name]
    params = {"a": jnp.eye(3), "b": jnp.eye(3), "c": jnp.eye(3), "s": jnp.ones(3)}
    estimator = ko.recursive_ggn(lambda p, x: ko.Normal(model(p, x)))
    with pytest.raises(ValueError, match=f"recursive_ggn: .*{message}"):
        estimator.layers(params, jnp.ones((4, 3)))


def test_blocks_and_words_that_do_not_fit_are_refused():
    params, x = oracles.make_params(0, (3, 2)), jnp.ones((4, 3))
    recursive, metric = (
        ko.recursive_ggn(oracles.classifier),
        ko.backpropagated_metric(oracles.classifier),
    )
    layers = recursive.layers(params, x)
    cases = [
        (
            recursive,
            ko.eva(layers, kl_clip=None),
            "block 'rank one'; expected a dense layer with kro",
        ),
        (recursive, ko.ekfac(layers, kl_clip=None), "expected a dense layer with kronecker"),
        (
            metric,
            ko.kfac(layers, kl_clip=None),
            r"expected a dense layer with quasi_diagonal_block",
        ),
        (recursive, ko.kfac_two_level(layers, kl_clip=None), "got the coupling"),
    ]
    for estimator, tx, message in cases:
        with pytest.raises(ValueError, match=message):
            tx.update(params, tx.init(params), params, curvature=estimator.at(params, x))
    with pytest.raises(ValueError, match="no backward pass that could be shared"):
        recursive.value_and_grad(lambda prediction, y: 0.0)
    with pytest.raises(ValueError, match="got microbatch_size=2; expected none"):
        recursive.at(params, x, microbatch_size=2)
    with pytest.raises(ValueError, match="subsample=1;"):
        ko.recursive_ggn(oracles.classifier, subsample=1)
