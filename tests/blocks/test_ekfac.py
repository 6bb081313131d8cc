"""Eigenvalue-corrected blocks: the moments are the diagonal of the exact Fisher block in the
eigenbasis, for every way a layer is used."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from kfac_optax.engine.choice import blocks_of
from kfac_optax.estimators import block_measure
from kfac_optax.estimators.plan import Plan
from kfac_optax.linalg.example_moments import example_moments
from tests import helpers as h
from tests import oracles
from tests.layers.gradients import x64_params

DAMPING = 0.1


class Found:
    """One layer after a refresh and one statistic in the new basis: dense matrices of every
    copy."""

    def __init__(self, estimator, params, args, layer, factors, inverse):
        p, q = layer.shape
        self.layer, self.factors, self.inverse = layer, factors, inverse
        exact = oracles.dense_block(estimator, params, args, layer)
        exact = exact.reshape(layer.copies, p * q, layer.copies, p * q)
        self.exact = [exact[k, :, k] for k in range(layer.copies)]
        self.bases = [
            np.kron(a, g) for a, g in zip(inverse.inputs.vectors, inverse.outputs.vectors)
        ]
        self.moments = [np.ravel(x) for x in inverse.moments]
        self.kronecker = [np.kron(a, g) for a, g in zip(*factors)]
        self.corrected = [(u * s) @ u.T for u, s in zip(self.bases, self.moments)]


def found(estimator, params, *args):
    """Every layer with an eigenvalue-corrected block, by path: refreshed at the first step,
    measured at the second."""
    layers = estimator.layers(params, *args)
    tx = ko.scale_by_curvature(layers, block=ko.ekfac_block(), damping=DAMPING, curvature_every=1)
    step = jax.jit(
        lambda p, s, a, refresh: tx.update(p, s, p, curvature=estimator.at(p, *a), refresh=refresh)[
            1
        ],
        static_argnames="refresh",
    )
    state = step(params, jax.jit(tx.init)(params), args, True)
    state = step(params, state, args, False)
    result = {}
    for layer in layers:
        (name,) = [n for n in state.inverses if f"{layer.shape[0]}x{layer.shape[1]}" in n]
        inverse = state.inverses[name]
        assert len(inverse.measured) == layer.copies, "every layer of these models has its bucket"
        np.testing.assert_array_equal(inverse.measured, 1)
        factors = state.factors[name]
        result[layer.path] = Found(estimator, params, args, layer, factors, inverse)
    return result


def assert_exact_diagonals(estimator, params, *args):
    """`S` is the diagonal of the exact block in the eigenbasis; returns the layers."""
    layers = found(estimator, params, *args)
    for path, layer in layers.items():
        for u, s, exact in zip(layer.bases, layer.moments, layer.exact):
            expected = np.einsum("ji,jk,ki->i", u, exact, u)
            scale = np.abs(expected).max()
            assert scale > 0
            np.testing.assert_allclose(s, expected, rtol=1e-9, atol=1e-11 * scale, err_msg=path)
    return layers


class Model(nn.Module):
    """Positions pooled before the loss, after one kind of layer."""

    kind: str

    @nn.compact
    def __call__(self, x):
        if self.kind == "positions":
            x = jnp.tanh(nn.Dense(4, name="first")(x)).mean(1)
        elif self.kind == "convolution":
            x = jnp.tanh(nn.Conv(4, (2,), name="first")(x)).mean(1)
        elif self.kind == "groups":
            x = jnp.tanh(nn.Conv(4, (2,), feature_group_count=2, name="first")(x)).mean(1)
        elif self.kind == "uses":
            layer = nn.Dense(2, name="first")
            x = jnp.tanh(layer(jnp.tanh(layer(x)))).sum(1)
        elif self.kind == "remat":
            x = jnp.tanh(nn.remat(nn.Dense)(4, name="first")(x)).mean(1)
        elif self.kind == "time":
            x = _in_time(nn.Dense(2, name="first"), x)
        elif self.kind == "layers":
            x = _over_layers(x)
        elif self.kind == "stack":
            x = _stack(x)
        return nn.Dense(3, name="head")(x)


def _in_time(layer, x):
    def body(layer, carry, x):
        return jnp.tanh(layer(carry + x)), None

    scan = nn.scan(body, variable_broadcast="params", split_rngs={"params": False}, in_axes=1)
    return scan(layer, jnp.zeros_like(x[:, 0]), x)[0]


def _over_layers(x):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jnp.tanh(nn.Dense(2, name="inner")(x)), None

    scan = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    return scan(name="first")(x, None)[0].sum(1)


def _stack(x):
    layer = nn.vmap(
        nn.Dense,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=3,
    )
    return jnp.tanh(layer(2, name="first")(x)).sum((0, 2))


KINDS = ("positions", "convolution", "groups", "uses", "remat", "time", "layers", "stack")


def problem(kind, weights=None):
    model, x = Model(kind), oracles.normal(0, (5, 4, 2))
    params = x64_params(lambda key, x: model.init(key, x)["params"], x)
    return lambda p, x: ko.Categorical(model.apply({"params": p}, x), weights=weights), params, x


def mlp(n):
    params = oracles.make_params(0, (3, 4, 2))
    return oracles.classifier, params, oracles.normal(1, (n, 3))


def test_dense_layers(x64):
    predict, params, x = mlp(6)
    assert_exact_diagonals(ko.ggn(predict), params, x)


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_use_a_layer(x64, kind):
    predict, params, x = problem(kind)
    layers = assert_exact_diagonals(ko.ggn(predict), params, x)
    copies = {"groups": 2, "layers": 3, "stack": 3}.get(kind, 1)
    assert sorted(x.layer.copies for x in layers.values()) == sorted((copies, 1))


@pytest.mark.parametrize("kind", ["positions", "uses", "time", "layers"])
def test_masked_examples_count_as_their_weights_and_padding_is_never_read(x64, kind):
    weights = jnp.array([1.0, 0.0, 2.0, 0.5, 0.0])
    predict, params, x = problem(kind, weights)
    whole = assert_exact_diagonals(ko.ggn(predict), params, x)
    broken = found(ko.ggn(predict), params, x.at[1].set(jnp.nan))
    for path, layer in whole.items():
        for ours, theirs in zip(layer.corrected, broken[path].corrected):
            np.testing.assert_allclose(theirs, ours, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("unrolled", [False, True])
def test_masked_steps_in_time(x64, unrolled):
    """One step of every example has a label: a row of weight zero matters for the label after
    it."""
    x, params = oracles.normal(0, (5, 3, 2)), {"w": oracles.normal(1, (2, 2))}
    weights = jnp.zeros((5, 3)).at[jnp.arange(5), jnp.array([0, 1, 2, 2, 1])].set(1.0)

    def predict(params, x):
        def body(carry, row):
            carry = jnp.tanh(h.dense(carry + row, params["w"]))
            return carry, carry

        steps = jnp.moveaxis(x, 1, 0)
        out = jax.lax.scan(body, jnp.zeros((5, 2)), steps, unroll=3 if unrolled else 1)[1]
        return ko.Categorical(jnp.moveaxis(out, 0, 1), weights=weights)

    assert_exact_diagonals(ko.ggn(predict), params, x)


def test_losses_of_every_position(x64):
    """The empirical Fisher has one loss for each example, whatever it adds up."""
    model, x = nn.Dense(3), oracles.normal(0, (5, 4, 2))
    params = x64_params(lambda key, x: model.init(key, x)["params"], x)

    def losses(params, x):
        labels = jnp.arange(20).reshape(5, 4) % 3
        return ko.Categorical(model.apply({"params": params}, x)).nll(labels).reshape(5, 4).sum(1)

    assert_exact_diagonals(ko.empirical_fisher(losses), params, x)


def test_squaring_before_adding_up_is_something_else():
    a, g = oracles.normal(0, (6, 3, 4)), oracles.normal(1, (6, 3, 2))
    products = np.einsum("brp,brq->bpq", a, g)
    got = example_moments(a, g)
    np.testing.assert_allclose(got, (products**2).sum(0), rtol=1e-5)
    rows = example_moments(a.reshape(18, 4), g.reshape(18, 2))
    assert np.abs(rows / got - 1).max() > 0.1


def test_parts_of_a_batch_add_up(x64, monkeypatch):
    a, g = oracles.normal(0, (6, 3, 4)), oracles.normal(1, (6, 3, 2))
    for entries in (1, 17, 30):
        np.testing.assert_allclose(
            example_moments(a, g, entries=entries), example_moments(a, g), rtol=1e-12
        )
    predict, params, x = problem("convolution")
    monkeypatch.setattr(block_measure, "PATCH_BYTES", 1)  # one example at a time
    assert_exact_diagonals(ko.ggn(predict), params, x)


@pytest.mark.parametrize("kind", ["mlp", *KINDS])
def test_nearer_to_the_exact_block_than_kfac_and_with_its_trace(x64, kind):
    predict, params, x = mlp(6) if kind == "mlp" else problem(kind)
    layers = found(ko.ggn(predict), params, x)
    for layer in layers.values():
        for exact, ours, theirs in zip(layer.exact, layer.corrected, layer.kronecker):
            error, of_kfac = (np.linalg.norm(exact - m) for m in (ours, theirs))
            assert error <= of_kfac * (1 + 1e-12)
            np.testing.assert_allclose(np.trace(ours), np.trace(exact), rtol=1e-10)
    first = next(iter(layers.values()))
    error, of_kfac = (
        np.linalg.norm(first.exact[0] - m[0]) for m in (first.corrected, first.kronecker)
    )
    assert error < 0.97 * of_kfac


def test_one_example_with_one_row_is_exact(x64):
    predict, params, x = mlp(1)
    for layer in found(ko.ggn(predict), params, x).values():
        np.testing.assert_allclose(layer.corrected[0], layer.exact[0], rtol=1e-9, atol=1e-12)


def test_the_solve_is_the_damped_inverse(x64):
    predict, params, x = mlp(6)
    block = ko.ekfac_block()
    for layer in found(ko.ggn(predict), params, x).values():
        v = oracles.normal(3, layer.layer.shape)
        inverse = jax.tree.map(lambda x: x[0], layer.inverse)
        got = block.solve(inverse, v, jnp.float64(DAMPING))
        damped = layer.corrected[0] + DAMPING * np.eye(v.size)
        np.testing.assert_allclose(np.ravel(got), np.linalg.solve(damped, np.ravel(v)), rtol=1e-9)


@functools.cache
def _runs():
    """The plain problem under a transformation without clip, one compiled step for each kind."""
    problem = h.plain_problem()
    tx = ko.scale_by_curvature(
        problem.layers, block=ko.ekfac_block(), damping=DAMPING, decay=0.6, stagger=2
    )

    @functools.partial(jax.jit, static_argnames="refresh")
    def step(state, x, refresh):
        curvature = problem.estimator.at(problem.params, x)
        return tx.update(
            problem.params, state, problem.params, curvature=curvature, refresh=refresh
        )[1]

    return jax.jit(tx.init)(problem.params), step, [oracles.normal(i, (8, 4)) for i in range(5)]


def _only(tree):
    (value,) = tree.values()
    return value


def test_moments_start_again_with_a_basis_and_are_averaged_within_one():
    state, step, batches = _runs()
    state = step(state, batches[0], True)
    inverse = _only(state.inverses)
    product = inverse.inputs.values[:, :, None] * inverse.outputs.values[:, None]
    np.testing.assert_array_equal(inverse.moments, product)
    np.testing.assert_array_equal(inverse.measured, 0)
    alone = [_only(step(state, x, False).inverses).moments for x in batches[1:]]
    expected = alone[0]
    for k, x in enumerate(batches[1:], 1):
        weight = min(1 - 1 / k, 0.6)
        expected = weight * expected + (1 - weight) * alone[k - 1]
        state = step(state, x, False)
        np.testing.assert_allclose(_only(state.inverses).moments, expected, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(_only(state.inverses).measured, k)


def test_only_the_part_that_is_refreshed_starts_again():
    state, step, batches = _runs()
    state = step(step(state, batches[0], True), batches[1], False)
    before = _only(state.inverses)
    after = _only(step(state, batches[2], (1,)).inverses)
    assert sorted(np.asarray(after.measured)) == [0, 2]
    (kept,) = np.flatnonzero(np.asarray(after.measured))
    np.testing.assert_array_equal(after.inputs.vectors[kept], before.inputs.vectors[kept])


def test_statistics_that_are_not_finite_leave_the_moments():
    state, step, batches = _runs()
    state = step(step(state, batches[0], True), batches[1], False)
    after = step(state, batches[2].at[0].set(jnp.nan), False)
    assert after.skipped_statistics == state.skipped_statistics + 1
    h.assert_equal(after.inverses, state.inverses)
    assert after.failed_inverses == state.failed_inverses


@pytest.mark.parametrize("kind", ["layers", "stack", "uses", "time"])
def test_a_shared_forward_pass_gives_the_same_moments(x64, kind):
    predict, params, x = problem(kind)
    estimator = ko.ggn(predict)
    layers, block_of = estimator.layers(params, x), blocks_of(ko.ekfac_block())
    inverses = tuple(
        _random_basis(i, layer, block_of(layer)) for i, layer in enumerate(layers.layers)
    )
    plan = Plan(layers.layers, tuple(map(block_of, layers)), None, jnp.float64, inverses=inverses)
    once = jax.jit(lambda p, x: estimator.at(p, x).statistics(plan)[0])(params, x)

    @jax.jit
    def shared(params, x):
        value_and_grad = estimator.value_and_grad(lambda prediction, y: prediction.mean_nll(y))
        return value_and_grad(params, x, targets=jnp.arange(5) % 3)[2].statistics(plan)[0]

    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(shared(params, x)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-12)


def _random_basis(seed, layer, block):
    """What a block makes of random factors, another one for every copy."""
    roots = [oracles.normal(seed + 7, (layer.copies, d, d)) for d in layer.shape]
    factors = block.init(layer, jnp.float64)._replace(
        inputs=roots[0] @ roots[0].mT, outputs=roots[1] @ roots[1].mT
    )
    return jax.vmap(block.factorize, (0, None))(factors, jnp.float64(DAMPING))


def test_training_reduces_the_loss_and_compiles_once():
    problem = h.linen_problem()
    tx = optax.chain(
        ko.ekfac(
            problem.layers, learning_rate=0.1, damping=0.05, curvature_every=1, inverse_every=4
        ),
        optax.sgd(0.1, 0.9),
    )

    @h.counted_jit
    def step(params, state):
        loss, grads = jax.value_and_grad(problem.loss)(params)
        updates, state = tx.update(grads, state, params, curvature=problem.at(params))
        return optax.apply_updates(params, updates), state, loss

    params, state = problem.params, jax.jit(tx.init)(problem.params)
    losses, start = [], state
    for _ in range(12):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert step.traces == 1
    h.assert_same_types(state, start)
    assert losses[-1] < 0.7 * losses[0], losses
    (core,) = [s for s in jax.tree.leaves(state, is_leaf=_is_curvature) if _is_curvature(s)]
    assert core.failed_inverses == core.skipped_statistics == core.non_finite_updates == 0


def _is_curvature(node):
    return hasattr(node, "kfac_count")


def test_layers_without_rows_of_examples_get_the_block_of_kfac_or_an_error():
    x, params = oracles.normal(0, (4, 3, 2)), {"w": oracles.normal(1, (2, 3))}

    def predict(params, x):
        flat = x.reshape(12, 2)
        return ko.Categorical(h.dense(flat, params["w"]).reshape(4, 3, 3).sum(1))

    estimator = ko.ggn(predict)
    layers = estimator.layers(params, x)
    tx = ko.ekfac(layers, learning_rate=0.1)
    _, state = tx.update(params, tx.init(params), params, curvature=estimator.at(params, x))
    (core,) = [s for s in jax.tree.leaves(state, is_leaf=_is_curvature) if _is_curvature(s)]
    assert not hasattr(_only(core.inverses), "moments")
    tx = ko.scale_by_curvature(layers, block=ko.ekfac_block())
    with pytest.raises(ValueError, match="needs the gradient of every example"):
        tx.update(params, tx.init(params), params, curvature=estimator.at(params, x))


def test_what_cannot_be_measured_raises():
    predict, params, x = h.plain_predict, h.plain_params(), oracles.normal(0, (8, 4))
    forward = ko.forward_only(predict)
    tx = ko.ekfac(forward.layers(params, x), learning_rate=0.1)
    with pytest.raises(ValueError, match="needs output gradients"):
        tx.update(params, tx.init(params), params, curvature=forward.at(params, x))
    estimator = ko.ggn(predict)
    plan = oracles.plan(estimator.layers(params, x), dtype=jnp.float32, block=ko.ekfac_block())
    with pytest.raises(ValueError, match="the plan has no inverse"):
        estimator.at(params, x).statistics(plan)


@pytest.mark.parametrize("normalization", ["unitwise", "diagonal", "pass"])
def test_normalization_layers_get_what_is_asked_for(normalization):
    def predict(params, x):
        x = ko.tap_dense(x @ params["w"], x, params["w"])
        return ko.Normal(ko.tap_scale_shift(params["s"] * x, x, params["s"]))

    params, x = {"w": jnp.ones((3, 2)), "s": jnp.ones(2)}, jnp.ones((4, 3))
    estimator = ko.ggn(predict)
    layers = estimator.layers(params, x)
    assert [layer.kind for layer in layers] == ["dense", "scale_shift"]
    tx = ko.ekfac(layers, kl_clip=None, normalization=normalization, uncovered="pass")
    grads = jax.tree.map(jnp.ones_like, params)
    curvature = estimator.at(params, x)
    updates, state = tx.update(grads, tx.init(params), params, curvature=curvature)
    factors = optax.tree.get(state, "factors")
    assert len(factors) == (1 if normalization == "pass" else 2)
    passed = bool(jnp.all(updates["s"] == 1))
    assert passed == (normalization == "pass")
