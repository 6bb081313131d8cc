"""Where theory says that a block is the exact GGN, it is; masks and weights equal dropped rows;
twins in other words.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from tests import helpers, oracles
from tests.layers.gradients import x64_params


def block_matrix(block, statistic, layer):
    p, q = layer.shape
    basis = jnp.eye(p * q).reshape(p * q, p, q)
    return np.asarray(jax.jit(jax.vmap(lambda v: block.multiply(statistic, v)))(basis)).reshape(
        p * q, -1
    )


def measured(estimator, params, *args, block=None, **options):
    layers = estimator.layers(params, *args)
    plan = oracles.plan(layers, block=block, **options)
    statistics, _ = jax.jit(lambda p, a: estimator.at(p, *a).statistics(plan))(params, args)
    return dict(zip([x.path for x in layers], zip(layers, plan.blocks, statistics))), statistics


def assert_exact(predict, params, *args, block=None, exact=True):
    estimator = ko.ggn(predict)
    found, _ = measured(estimator, params, *args, block=block)
    errors = []
    for layer, chosen, statistic in found.values():
        assert layer.copies == 1
        one = jax.tree.map(lambda x: x[0], statistic)
        dense = oracles.dense_block(estimator, params, args, layer)
        errors.append(np.abs(block_matrix(chosen, one, layer) - dense).max() / np.abs(dense).max())
    assert (max(errors) < 1e-8) == exact, errors


class DeepLinear(nn.Module):
    """Linear layers shared over positions; pooled before the loss or not."""

    pool: bool
    conv: bool = False

    @nn.compact
    def __call__(self, x):
        layer = (
            (lambda n, name: nn.Conv(n, (1,), name=name))
            if self.conv
            else (lambda n, name: nn.Dense(n, name=name))
        )
        x = layer(2, "second")(layer(3, "first")(x))
        return x.mean(1) if self.pool else x


@pytest.mark.parametrize(
    ("pool", "sharing", "conv"),
    [
        (False, "expand", False),
        (False, "reduce", False),
        (True, "expand", True),
        (True, "reduce", True),
    ],
)
def test_linear_nets_that_share_weights(x64, pool, sharing, conv):
    """Expand is exact where every position has its loss, reduce where positions are pooled; neither
    is both.
    """
    model, x = DeepLinear(pool, conv), oracles.normal(0, (4, 3, 2))
    params = x64_params(lambda key, x: model.init(key, x)["params"], x)
    predict = lambda p, x: ko.Normal(model.apply({"params": p}, x))
    assert_exact(
        predict, params, x, block=ko.kronecker(sharing=sharing), exact=pool == (sharing == "reduce")
    )


def test_one_position_is_a_dense_layer(x64):
    """A window as large as the image, and its flattened twin."""
    conv, dense = nn.Conv(2, (3, 2), padding="VALID"), nn.Dense(2)
    x = oracles.normal(0, (5, 3, 2, 2))
    params = x64_params(lambda key, x: conv.init(key, x)["params"], x)
    flat = {"kernel": params["kernel"].reshape(-1, 2), "bias": params["bias"]}
    one = measured(
        ko.ggn(lambda p, x: ko.Normal(conv.apply({"params": p}, x).reshape(5, 2))), params, x
    )[1]
    other = measured(
        ko.ggn(lambda p, x: ko.Normal(dense.apply({"params": p}, x))), flat, x.reshape(5, -1)
    )[1]
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)
    assert_exact(lambda p, x: ko.Normal(conv.apply({"params": p}, x).reshape(5, 2)), params, x)


def test_scale_and_shift_have_the_exact_blocks_of_their_channels(x64):
    model = nn.Sequential([nn.Dense(3), nn.LayerNorm(), jnp.tanh, nn.Dense(2)])
    x = oracles.normal(0, (4, 5, 2))
    params = x64_params(lambda key, x: model.init(key, x)["params"], x)
    estimator = ko.ggn(lambda p, x: ko.Categorical(model.apply({"params": p}, x).sum(1)))
    layer, block, statistic = measured(estimator, params, x)[0]["layers_1"]
    dense = oracles.dense_block(estimator, params, (x,), layer).reshape(2, 3, 2, 3)
    got = block_matrix(block, statistic[0], layer).reshape(2, 3, 2, 3)
    for c in range(3):
        np.testing.assert_allclose(got[:, c, :, c], dense[:, c, :, c], rtol=1e-8)


def test_an_embedding_is_a_dense_layer_on_one_hot_rows(x64):
    tokens = jnp.asarray([[0, 3, 3], [4, 1, 0]])
    table = {"table": oracles.normal(0, (5, 2))}
    look_up = ko.ggn(
        lambda p, t: ko.Categorical(jnp.tanh(ko.tap_embedding(p["table"][t], t, p["table"])))
    )

    def one_hot(p, t):
        x = jax.nn.one_hot(t, 5, dtype=p["table"].dtype)
        return ko.Categorical(jnp.tanh(ko.tap_dense(x @ p["table"], x, p["table"])))

    got, expected = (
        measured(look_up, table, tokens)[1][0],
        measured(ko.ggn(one_hot), table, tokens)[1][0],
    )
    np.testing.assert_allclose(got.counts[0], np.diagonal(expected.inputs[0]), rtol=1e-12)
    np.testing.assert_allclose(got.outputs, expected.outputs, rtol=1e-12)


def recurrent(cell=nn.GRUCell):
    model = nn.Sequential([nn.RNN(cell(3, param_dtype=jnp.float64)), nn.Dense(2)])
    x = oracles.normal(0, (4, 5, 2))
    return model, x, x64_params(lambda key, x: model.init(key, x)["params"], x)


@pytest.mark.parametrize("name", ["kronecker", "option2", "two_level"])
def test_masked_steps_in_time_count_as_dropped(x64, name):
    """A causal net with its last step masked is the net on the shorter sequence, inside the scan as
    outside.
    """
    model, x, params = recurrent()

    def predict(p, x, weights):
        return ko.Categorical(model.apply({"params": p}, x), weights=weights)

    estimator = ko.ggn(predict)
    mask = jnp.ones((4, 5)).at[:, -1].set(0)
    block = ko.recurrent(name) if name.startswith("option") else None
    coupling = ko.coarse_correction("exact") if name == "two_level" else None
    layers = estimator.layers(params, x, mask)
    results = []
    for args in ((x, mask), (x[:, :-1], mask[:, :-1])):
        plan = oracles.plan(layers, coupling, block=block)
        statistics, across = jax.jit(lambda p, a, plan=plan: estimator.at(p, *a).statistics(plan))(
            params, args
        )
        v = [oracles.normal(i, (1, *x.shape)) for i, x in enumerate(layers)]
        results.append(
            (
                [
                    jax.jit(jax.vmap(b.multiply))(s, w)
                    for b, s, w in zip(plan.blocks, statistics, v)
                ],
                across,
            )
        )
    for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)


class Masked(nn.Module):
    """Convolution, attention, normalisation and a head on tokens; masked tokens touch no other."""

    @nn.compact
    def __call__(self, tokens, mask):
        x = nn.Embed(6, 4, name="embed")(tokens)
        attend = nn.make_attention_mask(mask, mask, dtype=bool)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(
            nn.LayerNorm()(x), mask=attend
        )
        return nn.Dense(3, name="head")(jnp.tanh(nn.Dense(4, name="up")(x)))


@pytest.mark.parametrize("coarse", ["factored", "exact"])
def test_padding_tokens_count_as_dropped(x64, coarse):
    """Sequences padded by two tokens and masked give the update of the unpadded ones."""
    model, tokens = Masked(), jnp.asarray([[0, 3, 3], [4, 1, 0], [2, 2, 5]])
    padded = jnp.pad(tokens, ((0, 0), (0, 2)), constant_values=1)
    mask = jnp.pad(jnp.ones((3, 3)), ((0, 0), (0, 2)))
    params = x64_params(lambda key, t: model.init(key, t, jnp.ones(t.shape))["params"], tokens)
    predict = lambda p, t, m: ko.Categorical(model.apply({"params": p}, t, m > 0), weights=m)
    estimator, updates = ko.ggn(predict), []
    for args in ((padded, mask), (tokens, jnp.ones((3, 3)))):
        tx = ko.kfac_two_level(
            estimator.layers(params, *args), learning_rate=0.1, damping=0.1, coarse=coarse
        )
        grads = jax.tree.map(jnp.sin, params)
        step = jax.jit(
            lambda p, a, tx=tx, grads=grads: tx.update(
                grads, tx.init(p), p, curvature=estimator.at(p, *a)
            )[0]
        )
        updates.append(step(params, args))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(updates[0]), jax.tree.leaves(updates[1]), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("coarse", ["factored", "exact"])
def test_padding_tokens_of_a_tied_table_count_as_dropped(x64, coarse):
    """Look-ups and head have rows of their own, each weighted by the same mask."""
    params = {"table": oracles.normal(0, (5, 3))}
    tokens = jnp.asarray([[0, 3, 3], [4, 1, 0]])

    def predict(p, t, m):
        x = jnp.tanh(ko.tap_embedding(p["table"][t], t, p["table"]))
        return ko.Categorical(ko.tap_dense(x @ p["table"].T, x, p["table"].T), weights=m)

    padded, mask = jnp.pad(tokens, ((0, 0), (0, 2))), jnp.pad(jnp.ones((2, 3)), ((0, 0), (0, 2)))
    estimator, updates = ko.ggn(predict), []
    for args in ((padded, mask), (tokens, jnp.ones((2, 3)))):
        tx = ko.kfac_two_level(
            estimator.layers(params, *args), learning_rate=0.1, damping=0.1, coarse=coarse
        )
        grads = jax.tree.map(jnp.sin, params)
        step = jax.jit(
            lambda p, a, tx=tx, grads=grads: tx.update(
                grads, tx.init(p), p, curvature=estimator.at(p, *a)
            )[0]
        )
        updates.append(step(params, args))
    for a, b in zip(*map(jax.tree.leaves, updates), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8)


def test_a_shared_forward_pass_gives_the_same_statistics(x64):
    """Rows kept until it is known what to measure: of every kind of layer, tokens and left-over
    parameters included.
    """
    model, tokens = Masked(), jnp.asarray([[0, 3, 3], [4, 1, 0], [2, 2, 5]])
    mask = jnp.ones((3, 3)).at[0, 2].set(0)
    params = x64_params(lambda key, t: model.init(key, t, mask)["params"], tokens) | {
        "gain": jnp.ones(3)
    }

    def predict(p, t, m):
        net = {k: v for k, v in p.items() if k != "gain"}
        return ko.Categorical(
            model.apply({"params": net}, t, m > 0) * helpers.computed(p["gain"]), weights=m
        )

    estimator = ko.ggn(predict)
    tx = ko.kfac_two_level(
        estimator.layers(params, tokens, mask), learning_rate=0.1, damping=0.1, uncovered="diagonal"
    )

    @jax.jit
    def updates(params):
        step = estimator.value_and_grad(lambda prediction, y: prediction.mean_nll(y))
        _, grads, shared = step(params, tokens, mask, targets=tokens % 3)
        lazy = estimator.at(params, tokens, mask)
        return [tx.update(grads, tx.init(params), params, curvature=c)[0] for c in (shared, lazy)]

    for a, b in zip(*map(jax.tree.leaves, updates(params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_tokens_inside_a_scan_over_time_with_masked_steps(x64):
    """An embedding looked up step by step: rows are kept, since weights tell the steps apart."""
    tokens = jnp.asarray([[0, 3, 3, 1], [4, 1, 0, 2]])
    mask = jnp.ones((2, 4)).at[:, -1].set(0)
    params = {"table": oracles.normal(0, (5, 2)), "w": oracles.normal(1, (2, 2))}

    def predict(p, tokens, mask):
        def step(h, t):
            h = jnp.tanh(
                ko.tap_embedding(p["table"][t], t, p["table"]) + ko.tap_dense(h @ p["w"], h, p["w"])
            )
            return h, h

        _, hs = jax.lax.scan(step, jnp.zeros((len(tokens), 2)), tokens.T)
        return ko.Categorical(hs.swapaxes(0, 1), weights=mask)

    long = measured(ko.ggn(predict), params, tokens, mask)[0]
    short = measured(ko.ggn(predict), params, tokens[:, :-1], mask[:, :-1])[0]
    for path, (layer, block, statistic) in long.items():
        v = oracles.normal(2, (1, *layer.shape))
        expected = jax.vmap(block.multiply)(short[path][2], v)
        np.testing.assert_allclose(jax.vmap(block.multiply)(statistic, v), expected, rtol=1e-9)


def test_left_over_parameters_get_the_diagonal(x64):
    """One example: the diagonal is exact. Many: right on average over the random signs of the
    examples.
    """
    params = {"w": oracles.normal(0, (2, 3)), "gain": oracles.normal(1, (3,)), "idle": jnp.ones(2)}

    def predict(p, x):
        return ko.Normal(
            jnp.tanh(ko.tap_dense(x @ p["w"], x, p["w"])) * helpers.computed(p["gain"])
        )

    estimator = ko.ggn(predict)
    x = oracles.normal(2, (1, 2))
    layers = estimator.layers(params, x)
    tx = ko.kfac(layers, learning_rate=0.1, damping=0.3, kl_clip=None, uncovered="diagonal")
    grads = jax.tree.map(jnp.cos, params)
    step = jax.jit(
        lambda x, key: tx.update(
            grads, tx.init(params), params, curvature=estimator.at(params, x, key=key)
        )
    )
    updates, _ = step(x, jax.random.key(0))
    exact = jnp.tanh(x @ params["w"])[0] ** 2
    np.testing.assert_allclose(updates["gain"], grads["gain"] / (exact + 0.3), rtol=1e-10)
    np.testing.assert_allclose(updates["idle"], grads["idle"])  # the model does not touch it
    x = oracles.normal(3, (6, 2))
    statistics = jax.vmap(lambda key: step(x, key)[1].preconditioner.factors["diagonal_1x3"][0, 0])(
        jax.random.split(jax.random.key(1), 4000)
    )
    np.testing.assert_allclose(
        statistics.mean(0), jnp.mean(jnp.tanh(x @ params["w"]) ** 2, 0), rtol=0.1
    )


def test_normalisation_layers_can_be_left_alone():
    model = nn.Sequential([nn.Dense(3), nn.LayerNorm(), nn.Dense(2)])
    x = jnp.ones((4, 2))
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    fisher = ko.ggn(lambda p, x: ko.Categorical(model.apply({"params": p}, x)))
    grads = jax.tree.map(jnp.ones_like, params)
    for word, passed in (("pass", True), ("unitwise", False), ("diagonal", False)):
        tx = ko.kfac(
            fisher.layers(params, x), learning_rate=0.1, normalization=word, uncovered="diagonal"
        )
        updates, _ = jax.jit(
            lambda p, tx=tx: tx.update(grads, tx.init(p), p, curvature=fisher.at(p, x))
        )(params)
        scale = updates["layers_1"]["scale"]
        assert bool((scale == 1).all()) == passed
        assert bool(jnp.isfinite(optax.tree.norm(updates)))
    with pytest.raises(ValueError, match="normalization='skip'; expected one of 'unitwise'"):
        ko.kfac(fisher.layers(params, x), learning_rate=0.1, normalization="skip")
    forward = ko.forward_only(lambda p, x: ko.Categorical(model.apply({"params": p}, x)))
    tx = ko.kfac(forward.layers(params, x), learning_rate=0.1, uncovered="diagonal")
    updates, _ = jax.jit(lambda p: tx.update(grads, tx.init(p), p, curvature=forward.at(p, x)))(
        params
    )
    assert bool(jnp.isfinite(optax.tree.norm(updates)))


def test_channels_only_where_a_convolution_is_plain():
    """SUA sees the map itself, as its block would directly; grouped and transposed ones keep their
    patches.
    """

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3), strides=2, name="plain")(x))
            x = nn.relu(nn.Conv(4, (3, 3), feature_group_count=2, name="grouped")(x))
            return nn.ConvTranspose(2, (2, 2), strides=(2, 2), name="up")(x).mean((1, 2))

    x = jax.random.normal(jax.random.key(0), (3, 6, 6, 2))
    params = jax.jit(Net().init)(jax.random.key(1), x)["params"]
    fisher = ko.ggn(lambda p, x: ko.Categorical(Net().apply({"params": p}, x)))
    layers = fisher.layers(params, x)
    names = [ko.blocks_of(ko.kronecker(), convolution="sua")(layer).name for layer in layers]
    assert names == ["kronecker (sua)", "kronecker (eigh)", "kronecker (eigh)"]
    tx = ko.kfac_two_level(layers, kl_clip=None, damping=0.1, convolution="sua")
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = jax.jit(lambda p: tx.update(grads, tx.init(p), p, curvature=fisher.at(p, x)))(
        params
    )
    assert bool(jnp.isfinite(optax.tree.norm(updates)))
    seen = optax.tree.get(state, "factors")["conv_19x4_bias"]
    np.testing.assert_allclose(
        seen.moment[0], 9 * jnp.einsum("nhwc,nhwd->cd", x, x) / x[..., 0].size, rtol=1e-5
    )
    with pytest.raises(ValueError, match="convolution='fft'; expected one of 'kfc', 'sua'"):
        ko.kfac(layers, learning_rate=0.1, convolution="fft")


@pytest.mark.parametrize("option", ["option1", "option2"])
def test_temporal_correlations_reach_the_update(option):
    """Layers inside the scan get the block of their steps, in the order of time; the head outside
    keeps its own.
    """
    model = nn.Sequential([nn.RNN(nn.SimpleCell(3)), nn.Dense(2)])
    x = jax.random.normal(jax.random.key(0), (4, 5, 2))
    params = jax.jit(model.init)(jax.random.key(1), x)["params"]
    fisher = ko.ggn(lambda p, x: ko.Normal(model.apply({"params": p}, x)[:, -1]))
    tx = ko.kfac(
        fisher.layers(params, x), learning_rate=0.1, damping=0.1, recurrence=option, kl_clip=None
    )
    grads = jax.tree.map(jnp.ones_like, params)
    _, state = jax.jit(lambda p: tx.update(grads, tx.init(p), p, curvature=fisher.at(p, x)))(params)
    a = x  # inputs of the input-to-hidden layer, whose bias is a column of ones
    factors = state.preconditioner.factors["dense_3x3_bias"]
    lag = jnp.einsum("ntp,ntq->pq", a[:, 1:], a[:, :-1]) / 20
    np.testing.assert_allclose(factors.inputs_lag[0, :2, :2], lag, rtol=1e-4, atol=1e-6)
    assert set(state.preconditioner.factors) == {"dense_3x3_bias", "dense_3x3", "dense_4x2_bias"}
