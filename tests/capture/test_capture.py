"""Statistics of one network written in many ways equal those of the dense reference."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kfac_optax as ko
from kfac_optax.couplings.coarse import coarse_matrix
from tests import oracles

SIZES = (6, 6, 6, 3)
N = 8


def statistics(estimator, params, *args, coupling=None, key=None, dtype=jnp.float32):
    """Layers and their statistics, compiled."""
    layers = estimator.layers(params, *args)
    plan = oracles.plan(layers, coupling, dtype)
    run = jax.jit(lambda p, a: estimator.at(p, *a, key=key).statistics(plan))
    return layers, *run(params, args)


@functools.cache
def reference():
    """Parameters, inputs and `[(A, G)]` of the three layers for a Gaussian likelihood and all
    output columns.
    """
    params = jax.tree.map(lambda x: x.astype(jnp.float32), oracles.make_params(0, SIZES))
    x = oracles.normal(1, (N, SIZES[0])).astype(jnp.float32)
    seeds = jnp.broadcast_to(jnp.eye(3)[:, None], (3, N, 3))
    a, g = oracles.per_example(params, x, seeds)
    factors = [(ai.T @ ai / N, np.einsum("cni,cnj->ij", gi, gi) / N) for ai, gi in zip(a, g)]
    return params, x, factors


class MLP(nn.Module):
    first: type = nn.Dense

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(self.first(6, name="layer0")(x))
        x = jnp.tanh(self.first(6, name="layer1")(x))
        return nn.Dense(3, name="layer2")(x)


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(6, name="dense")(x)), None


class Scanned(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        body = nn.remat(Body, prevent_cse=False) if self.remat else Body
        scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = scan(name="body")(x, None)
        return nn.Dense(3, name="layer2")(x)


class NnxMLP(nnx.Module):
    def __init__(self, rngs):
        self.layer0, self.layer1 = nnx.Linear(6, 6, rngs=rngs), nnx.Linear(6, 6, rngs=rngs)
        self.layer2 = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.layer2(jnp.tanh(self.layer1(jnp.tanh(self.layer0(x)))))


def linen(model):
    return lambda p, x: model.apply({"params": p}, x)


def warmed_jit(params, x):
    apply = jax.jit(MLP().apply)
    apply({"params": params}, x)  # compiled and cached before the estimator ever traces it
    return lambda p, x: apply({"params": p}, x)


def nnx_predict(params, wrap):
    graph, state = nnx.split(NnxMLP(nnx.Rngs(0)))
    nnx.replace_by_pure_dict(state, params)
    return lambda p, x: wrap(lambda model, x: model(x))(nnx.merge(graph, p), x), state


def transposed(p, x):
    for i, layer in enumerate(p.values()):
        s = ko.tap_dense(x @ layer["kernel"].T + layer["bias"], x, layer["kernel"].T, layer["bias"])
        x = jnp.tanh(s) if i < 2 else s
    return x


def lax_scan(p, x):
    def body(x, layer):
        s = ko.tap_dense(x @ layer["kernel"] + layer["bias"], x, layer["kernel"], layer["bias"])
        return jnp.tanh(s), None

    x, _ = jax.lax.scan(body, x, p["body"])
    return ko.tap_dense(
        x @ p["layer2"]["kernel"] + p["layer2"]["bias"],
        x,
        p["layer2"]["kernel"],
        p["layer2"]["bias"],
    )


@jax.custom_jvp
def own_tanh(x):
    return jnp.tanh(x)


own_tanh.defjvp(lambda x, dx: (jnp.tanh(*x), (1 - jnp.tanh(*x) ** 2) * dx[0]))


def own_activation(p, x):
    """An activation with a derivative rule of its own, as many of `jax.nn` are: its layers are
    outside the rule.
    """
    for i, layer in enumerate(p.values()):
        s = ko.tap_dense(x @ layer["kernel"] + layer["bias"], x, layer["kernel"], layer["bias"])
        x = own_tanh(s) if i < 2 else s
    return x


def stack_two(params):
    body = jax.tree.map(lambda *v: jnp.stack(v), params["layer0"], params["layer1"])
    return body, params["layer2"]


def variants():
    params, x, _ = reference()
    body, last = stack_two(params)
    two = {"body": body, "layer2": last}
    yield "plain", linen(MLP()), params
    yield "jax.jit, warmed", warmed_jit(params, x), params
    yield "nn.jit", linen(MLP(first=nn.jit(nn.Dense))), params
    yield "nn.remat", linen(MLP(first=nn.remat(nn.Dense))), params
    yield "jax.checkpoint", jax.checkpoint(linen(MLP())), params
    yield (
        "vmap over examples",
        lambda p, x: jax.vmap(lambda e: MLP().apply({"params": p}, e))(x),
        params,
    )
    yield "custom_jvp activation", own_activation, params
    yield "nn.scan over layers", linen(Scanned()), {"body": {"dense": body}, "layer2": last}
    yield (
        "nn.scan of nn.remat",
        linen(Scanned(remat=True)),
        {"body": {"dense": body}, "layer2": last},
    )
    yield "lax.scan over layers", lax_scan, two
    yield (
        "transposed kernels",
        transposed,
        jax.tree.map(lambda v: v.T if v.ndim == 2 else v, params),
    )
    for name, wrap in [("nnx", lambda f: f), ("nnx.jit", nnx.jit), ("nnx.remat", nnx.remat)]:
        predict, state = nnx_predict(params, wrap)
        yield name, predict, state


@pytest.mark.parametrize(
    ("name", "predict", "params"), list(variants()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_every_way_of_writing_it_gives_the_same_factors(name, predict, params):
    _, x, factors = reference()
    estimator = ko.ggn(lambda p, x: ko.Normal(predict(p, x)))
    layers, measured, _ = statistics(estimator, params, x)
    assert not layers.uncovered
    assert [layer.uses for layer in layers] == [1] * len(layers)
    # a stack counts layer by layer
    got = [(a, g) for m in measured for a, g in zip(m.inputs, m.outputs)]
    assert len(got) == len(factors)
    for (a, g), (expected_a, expected_g) in zip(got, factors):
        np.testing.assert_allclose(a, expected_a, rtol=2e-5, atol=1e-5)
        np.testing.assert_allclose(g, expected_g, rtol=2e-5, atol=1e-5)


def shared(how):
    """One kernel used at T steps on `[N, T, d]`, its outputs added up."""

    def step(p, x):
        return ko.tap_dense(x @ p["kernel"] + p["bias"], x, p["kernel"], p["bias"])

    def predict(p, x):
        if how == "positions":
            out = jnp.tanh(step(p, x)).sum(1)
        elif how == "unrolled":
            out = sum(jnp.tanh(step(p, x[:, t])) for t in range(x.shape[1]))
        elif how == "scan over time":
            out, _ = jax.lax.scan(
                lambda c, e: (c + jnp.tanh(step(p, e)), None),
                jnp.zeros((len(x), 3)),
                x.swapaxes(0, 1),
            )
        elif how == "carried":  # the parameters travel in the carry, untouched
            carry = (jnp.zeros((len(x), 3)), p)
            (out, _), _ = jax.lax.scan(
                lambda c, e: ((c[0] + jnp.tanh(step(c[1], e)), c[1]), None), carry, x.swapaxes(0, 1)
            )
        else:
            out = jnp.tanh(jax.vmap(lambda e: step(p, e), 1, 1)(x)).sum(1)
        return ko.Normal(out)

    return predict


@pytest.mark.parametrize(
    "how", ["positions", "unrolled", "scan over time", "carried", "vmap over positions"]
)
def test_weight_sharing_sums_inputs_and_averages_gradients(how):
    steps = 4
    params = {
        "kernel": oracles.normal(0, (2, 3)).astype(jnp.float32),
        "bias": jnp.zeros(3, jnp.float32),
    }
    x = oracles.normal(1, (N, steps, 2)).astype(jnp.float32)
    # an axis mapped over inside the model goes in front, where the coarse level expects the
    # examples: see below
    for coarse in [None] if how == "vmap over positions" else ["factored", "exact"]:
        coupling = None if coarse is None else ko.coarse_correction(coarse)
        layers, (measured,), across = statistics(ko.ggn(shared(how)), params, x, coupling=coupling)
        (layer,) = layers
        assert layer.uses == (1 if "positions" in how else steps)
        assert layer.rows == N * steps
        a = np.concatenate([np.asarray(x), np.ones((N, steps, 1), np.float32)], -1)
        # every output column sees its own slope
        slope = 1 - np.tanh(x @ params["kernel"] + params["bias"]) ** 2
        g = np.einsum("ntq,qc->cntq", slope, np.eye(3))
        np.testing.assert_allclose(
            measured.inputs[0], np.einsum("nti,ntj->ij", a, a) / N, rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(
            measured.outputs[0], np.einsum("cnti,cntj->ij", g, g) / (N * steps), rtol=1e-5
        )
        alpha, gamma = a.sum(-1), g.sum(-1)
        if coarse is None:
            continue
        if coarse == "exact":
            expected = np.sum(np.einsum("nt,cnt->cn", alpha, gamma) ** 2) / N
        else:
            expected = np.sum(alpha**2) / N * np.sum(gamma**2) / (N * steps)
        np.testing.assert_allclose(coarse_matrix(across), [[expected]], rtol=1e-5)


def test_coarse_level_refuses_rows_that_are_not_per_example():
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
    x = jnp.ones((N, 4, 2))
    for predict in (
        shared("vmap over positions"),
        lambda p, x: ko.Normal(flattened(p, x).reshape(N, 4, 3).sum(1)),
    ):
        with pytest.raises(ValueError, match="Axis 0 of a layer's input has to be the examples"):
            ko.kfac_two_level(ko.ggn(predict).layers(params, x), learning_rate=0.1)


def flattened(p, x):
    x = x.reshape(-1, x.shape[-1])
    return ko.tap_dense(x @ p["kernel"] + p["bias"], x, p["kernel"], p["bias"])


def test_rnn_over_time_and_several_models_in_one_predict():
    class Recurrent(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.RNN(nn.SimpleCell(features=4))(x)[:, -1])

    x = oracles.normal(0, (N, 5, 2)).astype(jnp.float32)
    models = {"rnn": Recurrent(), "mlp": nn.Dense(3)}
    params = {
        "rnn": Recurrent().init(jax.random.key(0), x),
        "mlp": models["mlp"].init(jax.random.key(1), x[:, 0]),
    }

    def predict(p, x):
        return {k: ko.Normal(models[k].apply(p[k], x if k == "rnn" else x[:, 0])) for k in models}

    layers, measured, across = statistics(
        ko.ggn(predict), params, x, coupling=ko.coarse_correction("factored")
    )
    by_path = {layer.path: (layer, m) for layer, m in zip(layers, measured)}
    assert set(by_path) == {
        "mlp/params",
        "rnn/params/Dense_0",
        "rnn/params/SimpleCell_0/i",
        "rnn/params/SimpleCell_0/h",
    }
    recurrent, factors = by_path["rnn/params/SimpleCell_0/h"]
    assert (recurrent.uses, recurrent.rows) == (5, 5 * N)
    assert across.inputs.shape == (4, 4)
    a = np.concatenate([np.asarray(x[:, 0]), np.ones((N, 1), np.float32)], -1)
    np.testing.assert_allclose(by_path["mlp/params"][1].inputs[0], a.T @ a / N, rtol=1e-5)
    np.testing.assert_allclose(by_path["mlp/params"][1].outputs[0], np.eye(3), atol=1e-6)
    # the hidden state starts at zero, so its second moment over time misses one step
    hidden = np.zeros((N, 4), np.float32)
    cell, total = params["rnn"]["params"]["SimpleCell_0"], np.zeros((4, 4))
    for t in range(5):
        total += hidden.T @ hidden / N
        hidden = np.tanh(
            x[:, t] @ cell["i"]["kernel"] + cell["i"]["bias"] + hidden @ cell["h"]["kernel"]
        )
    np.testing.assert_allclose(factors.inputs[0], total, rtol=1e-4, atol=1e-5)


def test_casts_to_bfloat16_are_followed_and_factors_stay_float32():
    params, x, factors = reference()

    def predict(p, x):
        half = jax.tree.map(lambda v: v.astype(jnp.bfloat16), p)
        return ko.Normal(MLP().apply({"params": half}, x.astype(jnp.bfloat16)))

    layers, measured, _ = statistics(ko.ggn(predict), params, x)
    assert len(layers) == 3 and not layers.uncovered
    for m, (a, g) in zip(measured, factors):
        assert m.inputs.dtype == m.outputs.dtype == jnp.float32
        np.testing.assert_allclose(m.inputs[0], a, rtol=0.05, atol=0.05)
        np.testing.assert_allclose(m.outputs[0], g, rtol=0.1, atol=0.1)


def test_taps_do_nothing_outside_an_estimator():
    params, x, _ = reference()
    apply = jax.jit(MLP().apply)
    predict = lambda p, x: ko.Normal(apply({"params": p}, x))
    ko.ggn(predict).layers(params, x)
    text = str(jax.make_jaxpr(apply)({"params": params}, x)) + str(
        jax.make_jaxpr(oracles.forward)(params, x)
    )
    assert "kfac_tap" not in text
    assert nnx.Linear.__call__.__module__.startswith("flax")


def test_parameters_that_are_not_a_layer_are_listed_with_the_reason():
    def predict(p, x):
        w = p["v"] / jnp.linalg.norm(p["v"])  # the kernel is computed, not a parameter
        h = ko.tap_dense(x @ w, x, w)
        h = h * jnp.exp(p["scale"])
        part = p["stacked"][0]
        h = ko.tap_dense(h @ part, h, part)
        return ko.Normal(ko.tap_dense(h @ p["kernel"] + p["kernel"].sum(), h, p["kernel"]))

    shapes = {"v": (4, 3), "scale": (3,), "stacked": (2, 3, 3), "kernel": (3, 2), "idle": (7,)}
    params = {k: jnp.ones(s) for k, s in shapes.items()}
    layers = ko.ggn(predict).layers(params, jnp.ones((5, 4)))
    assert [layer.kernel for layer in layers] == ["stacked", "kernel"]
    assert "also used by reduce_sum" in layers.layers[1].notes[0]
    reasons = {u.path: u.reason for u in layers.uncovered}
    assert reasons["idle"] == "not used"
    assert "exp" in reasons["scale"]
    assert "div" in reasons["v"] and "outside any supported layer" in reasons["v"]
    table = str(ko.coverage(layers))
    for word in ("kernel", "not covered", "reason", "idle", "4x3", "total"):
        assert word in table


def test_kernel_shared_with_different_biases_leaves_the_biases_out():
    def predict(p, x):
        h = ko.tap_dense(x @ p["w"] + p["b1"], x, p["w"], p["b1"])
        return ko.Normal(ko.tap_dense(h @ p["w"] + p["b2"], h, p["w"], p["b2"]))

    params = {"w": jnp.eye(3), "b1": jnp.zeros(3), "b2": jnp.zeros(3)}
    layers, (measured,), _ = statistics(ko.ggn(predict), params, jnp.ones((5, 3)))
    assert [(x.kernel, x.bias, x.uses) for x in layers] == [("w", None, 2)]
    assert {u.path for u in layers.uncovered} == {"b1", "b2"}
    np.testing.assert_allclose(measured.inputs[0], 2 * np.ones((3, 3)), rtol=1e-6)
    np.testing.assert_allclose(measured.outputs[0], np.eye(3), rtol=1e-6)


@pytest.mark.parametrize("where", ["cond", "while", "switch"])
def test_layer_under_a_branch_raises_and_is_named(where):
    def layer(x, w):
        return ko.tap_dense(x @ w, x, w, name="inner")

    def predict(w, x):
        if where == "cond":
            out = jax.lax.cond(x.sum() > 0, lambda: layer(x, w), lambda: x)
        elif where == "switch":
            out = jax.lax.switch(
                0 * x.sum().astype(int), [lambda: x, lambda: jax.jit(layer)(x, w), lambda: x]
            )
        else:
            out = jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: layer(c, w), x)
        return ko.Normal(out)

    name = "while" if where == "while" else "cond"
    with pytest.raises(ValueError, match=rf"layer 'inner' runs inside `{name}`"):
        ko.ggn(predict).layers(jnp.eye(2), jnp.ones((3, 2)))


def test_stacked_by_vmap_over_parameters():
    """An ensemble: parameters mapped over are a stack of layers."""
    params = {"w": oracles.normal(0, (3, 2, 2)).astype(jnp.float32)}
    x = oracles.normal(1, (N, 2)).astype(jnp.float32)

    def predict(p, x):
        member = lambda w: ko.tap_dense(x @ w, x, w)
        return ko.Normal(jax.vmap(member)(p["w"]).swapaxes(0, 1))

    layers, (measured,), _ = statistics(ko.ggn(predict), params, x)
    assert layers.layers[0].stack == (3,)
    np.testing.assert_allclose(measured.inputs, np.broadcast_to(x.T @ x / N, (3, 2, 2)), rtol=1e-5)
    np.testing.assert_allclose(measured.outputs, np.broadcast_to(np.eye(2), (3, 2, 2)), atol=1e-6)
