"""Models written by hand, without taps: the traced program shows where their parameters are used."""

import functools
import os
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex

import kfac_optax as ko
from kfac_optax.capture.discovery.program import with_taps
from kfac_optax.capture.jaxpr import code_lines
from kfac_optax.capture.sites import count_taps
from kfac_optax.capture.tap import tapping
from kfac_optax.couplings.coarse import coarse_matrix
from tests import oracles
from tests.layers import gradients
from tests.layers.gradients import assert_gradients, squares

N = 5


def normal(*shape, seed=0):
    """NumPy draws in double precision, whatever JAX is set to while tests are collected."""
    return np.random.default_rng(seed + sum(shape)).normal(size=shape)


def mlp_params():
    first = {"w": normal(3, 4), "b": normal(4)}
    return {"first": first, "last": {"w": normal(4, 2), "b": normal(2)}}


def mlp(p, x):
    hidden = jnp.tanh(x @ p["first"]["w"] + p["first"]["b"])
    return hidden @ p["last"]["w"] + p["last"]["b"]


def equinox_like(p, x):
    """Weights `[out, in]`, layers of one example."""
    hidden = jnp.tanh(p["first"]["w"] @ x + p["first"]["b"])
    return p["last"]["w"] @ hidden + p["last"]["b"]


def stored_transposed():
    return jax.tree.map(lambda v: v.T, mlp_params())


def over_layers(p, x):
    step = lambda h, layer: (jnp.tanh(h @ layer["w"] + layer["b"]), None)
    return jax.lax.scan(jax.checkpoint(step), x, p)[0]


def over_time(p, x):
    step = lambda h, x: (jnp.tanh(x @ p["x"] + h @ p["h"] + p["b"]), None)
    return jax.lax.scan(step, jnp.zeros((len(x), 3)), x.swapaxes(0, 1))[0]


def attention(p, x):
    q, k, v = jnp.einsum("ntd,cdhk->cnthk", x, p["qkv"])
    weights = jax.nn.softmax(jnp.einsum("nthk,nshk->nhts", q, k))
    return jnp.einsum("nhts,nshk,hko->nto", weights, v, p["out"])


def experts(p, x):
    """The outputs of all experts, of which a gate would take a mean."""
    hidden = jnp.tanh(jnp.einsum("ntd,edf->entf", x, p["in"]))
    return jnp.einsum("entf,efo->nto", hidden, p["out"])


def language_model(p, tokens):
    hidden = p["table"][tokens] + p["positions"][: tokens.shape[1]]
    return jnp.tanh(hidden * (1 + p["scale"])) @ p["table"].T


def convolutions(p, x):
    """Channels first, and groups with channels last."""
    y = jax.lax.conv_general_dilated(x, p["w"], (1, 1), "SAME")
    y = jnp.tanh(y + p["b"][:, None, None])
    axes = ("NCHW", "HWIO", "NHWC")
    grouped = functools.partial(jax.lax.conv_general_dilated, feature_group_count=2)
    return grouped(y, p["v"], (2, 1), "VALID", dimension_numbers=axes) + p["c"]


def norms(p, x):
    """By hand: root mean square; scale and shift of one example, and the same scale without."""
    x = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * p["rms"]
    shifted = jax.vmap(lambda e: p["scale"] * jnp.sin(e) + p["shift"])(x)
    return jnp.tanh(p["scale"] * shifted) - p["positions"]


def envelopes(p, r):
    """Of a wave function: `sum_i pi_ik exp(-sigma_ik |r_i|)`."""
    return jnp.sum(jnp.exp(-jnp.abs(r)[..., None] * p["sigma"]) * p["pi"], 1)


def autoencoder(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["w"].T + p["c"]


def adapted(p, x):
    """Low-rank, one factor after the other; a vector and a number at the end."""
    return (x @ p["down"] @ p["up"] @ p["v"] + p["offset"])[:, None]


X = normal(N, 3)
MODELS = {
    "plain": (mlp, mlp_params(), X),
    "jit": (jax.jit(mlp), mlp_params(), X),
    "one example": (jax.vmap(equinox_like, (None, 0)), stored_transposed(), X),
    "layers": (over_layers, {"w": normal(2, 3, 3), "b": normal(2, 3)}, X),
    "time": (over_time, {"x": normal(2, 3), "h": normal(3, 3), "b": normal(3)}, normal(N, 3, 2)),
    "attention": (attention, {"qkv": normal(3, 4, 2, 2), "out": normal(2, 2, 3)}, normal(N, 3, 4)),
    "experts": (experts, {"in": normal(3, 4, 2), "out": normal(3, 2, 2)}, normal(N, 2, 4)),
    "language": (
        language_model,
        {"table": normal(6, 3), "positions": normal(4, 3), "scale": normal(3)},
        np.asarray([[0, 1, 5], [2, 2, 3], [0, 4, 1], [1, 1, 1], [5, 0, 2]]),
    ),
    "convolutions": (
        convolutions,
        {"w": normal(4, 3, 3, 2), "b": normal(4), "v": normal(2, 1, 2, 4), "c": normal(4)},
        normal(N, 3, 4, 4),
    ),
    "norms": (
        norms,
        {
            "rms": normal(3),
            "scale": normal(3, seed=1),
            "shift": normal(3),
            "positions": normal(4, 3),
        },
        normal(N, 4, 3),
    ),
    "envelopes": (envelopes, {"sigma": normal(3, 4), "pi": normal(3, 4, seed=1)}, X),
    "autoencoder": (autoencoder, {"w": normal(3, 2), "b": normal(2), "c": normal(3)}, X),
    "adapted": (
        adapted,
        {"down": normal(3, 1), "up": normal(1, 4), "v": normal(4), "offset": normal()},
        X,
    ),
    "ensemble": (
        lambda p, x: jax.vmap(mlp, (0, None))(p, x).swapaxes(0, 1),
        jax.tree.map(lambda v: np.stack([v, 2 * v]), mlp_params()),
        X,
    ),
}
# kind, inputs and outputs of one group, whether there is a bias, uses
LAYERS = {
    "plain": {"first": ("dense", 3, 4, True, 1), "last": ("dense", 4, 2, True, 1)},
    "one example": {"first": ("dense", 3, 4, True, 1), "last": ("dense", 4, 2, True, 1)},
    "layers": {"w": ("dense", 3, 3, True, 1)},
    "time": {
        "x": ("dense", 2, 3, False, 3),
        "h": ("dense", 3, 3, False, 3),
        "b": ("scale_shift", 1, 3, False, 3),
    },
    "language": {
        "table": ("tied_embedding", 6, 3, False, 2),
        "positions": ("embedding", 4, 3, False, 1),
        "scale": ("scale_shift", 1, 3, False, 1),
    },
    "convolutions": {"w": ("conv", 18, 4, True, 1), "v": ("conv", 4, 2, True, 1)},
    "norms": {
        "rms": ("scale_shift", 1, 3, False, 1),
        "scale": ("scale_shift", 1, 3, True, 2),
        "positions": ("scale_shift", 1, 12, False, 1),
    },
    "autoencoder": {"w": ("dense", 3, 2, True, 2), "c": ("scale_shift", 1, 3, False, 1)},
    "adapted": {
        "down": ("dense", 3, 1, False, 1),
        "up": ("dense", 1, 4, False, 1),
        "v": ("dense", 4, 1, True, 1),
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_covered_and_gives_its_own_gradient_back(x64, name):
    model, params, x = MODELS[name]
    layers = assert_gradients(lambda p, x: squares(model(p, x)), params, x, rtol=1e-10)
    assert not any(layer.partly for layer in layers)
    if name in LAYERS:
        got = {x.path: (x.kind, x.inputs, x.outputs, x.bias is not None, x.uses) for x in layers}
        assert got == LAYERS[name]


def test_without_taps_the_statistics_are_those_with_taps(x64):
    """Bit for bit: `x @ w + b` is the layer that the tap says."""
    estimators = [ko.ggn(lambda p, x: ko.Normal(model(p, x))) for model in (mlp, tapped)]
    got, want = (measured(e, mlp_params(), X) for e in estimators)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def dense(x, layer):
    return ko.tap_dense(x @ layer["w"] + layer["b"], x, layer["w"], layer["b"])


def tapped(p, x):
    return dense(jnp.tanh(dense(x, p["first"])), p["last"])


def measured(estimator, *args, coupling=None):
    plan = oracles.plan(estimator.layers(*args), coupling)
    return jax.jit(lambda *args: estimator.at(*args).statistics(plan))(*args)


def test_equinox_and_lists_of_layers(x64):
    """A model of Equinox as it is: its weights are `[out, in]`, its layers see one example."""
    model = eqx.nn.MLP(3, 2, 4, 2, activation=jnp.tanh, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)
    losses = lambda p, x: squares(jax.vmap(eqx.combine(p, static))(x))
    layers = assert_gradients(losses, params, X, rtol=1e-10)
    assert [(x.path, x.inputs, x.outputs) for x in layers] == [
        ("layers/0", 3, 4),
        ("layers/1", 4, 4),
        ("layers/2", 4, 2),
    ]


def test_a_program_whose_layers_are_tapped_is_handed_back():
    """Nothing is added where a front end has seen everything; `x @ w` gets one tap, no equation."""
    shapes = mlp_params(), X
    estimator = ko.ggn(lambda p, x: ko.Normal(tapped(p, x)))
    with tapping():
        closed = jax.make_jaxpr(tapped)(*shapes)
    assert with_taps(closed, 4, N) is closed
    assert estimator.layers(*shapes).layers
    plain = jax.make_jaxpr(mlp)(*shapes)
    got = with_taps(plain, 4, N)
    assert count_taps(got.jaxpr) == 2 and len(got.eqns) == len(plain.eqns) + 2
    np.testing.assert_array_equal(
        jax.tree.leaves(jax.jit(mlp)(*shapes))[0],
        jax.jit(jex.jaxpr_as_fun(got))(*jax.tree.leaves(shapes))[0],
    )


@pytest.mark.parametrize("mode", ["clip", "fill"])
def test_tokens_out_of_bounds_count_where_their_gradient_goes(x64, mode):
    """At the end of the table, or nowhere; negative ones count from the end."""
    tokens = np.asarray([[0, 9], [2, 6], [5, -1], [1, -8], [3, 4]])
    look_up = lambda p, t: squares(jnp.tanh(p["table"].at[t].get(mode=mode, fill_value=0)))
    assert_gradients(look_up, {"table": normal(6, 3)}, tokens, rtol=1e-10)


def test_a_coupling_counts_no_token_out_of_bounds(x64):
    """Their row of the table is zero, and so is its sum."""
    tokens = np.asarray([[0, 9], [2, 6], [5, -1], [1, -8], [3, 4]])
    model = lambda p, t: jnp.tanh(p["table"].at[t].get(mode="fill", fill_value=0)).reshape(N, -1)
    estimator, params = ko.ggn(lambda p, t: ko.Normal(model(p, t))), {"table": normal(6, 3)}
    _, across = measured(estimator, params, tokens, coupling=ko.coarse_correction("exact"))
    jacobian = jax.jacobian(model)(params, tokens)["table"].sum((-1, -2))
    np.testing.assert_allclose(coarse_matrix(across), [[jnp.sum(jacobian**2) / N]], rtol=1e-10)


def test_parameters_of_integers_and_flags_are_no_layers():
    """They have no gradient, and what they are multiplied with is covered as ever."""
    params = {"w": jnp.eye(3), "counts": jnp.arange(3), "flags": jnp.array([True, False, True])}
    estimator = ko.ggn(lambda p, x: ko.Normal(x @ p["w"] * p["counts"] * p["flags"]))
    layers = estimator.layers(params, jnp.ones((N, 3)))
    assert [layer.path for layer in layers] == ["w"]
    assert {u.path for u in layers.uncovered} == {"counts", "flags"}
    assert all("not of floating point" in u.reason for u in layers.uncovered)
    for word in ("pass", "graft", "diagonal"):
        tx = ko.kfac(layers, learning_rate=0.1, uncovered=word)
        at = estimator.at(params, jnp.ones((N, 3)))
        updates, _ = tx.update(params, tx.init(params), params, curvature=at)
        jax.tree.map(
            np.testing.assert_array_equal,
            {name: updates[name] for name in ("counts", "flags")},
            {name: params[name] for name in ("counts", "flags")},
        )


@pytest.mark.parametrize("directions", [N, 3])  # as many as examples, and not
def test_the_axis_of_the_examples_is_followed(x64, directions):
    """A model mapped over something else has its rows `[directions, N, p]`, also if both are as
    long.
    """
    shifts = normal(directions, 3)

    def mapped(p, x):
        return jax.vmap(lambda shift: mlp(p, x + shift))(shifts).swapaxes(0, 1)

    def in_front(p, x):
        return mlp(p, x[:, None] + shifts)

    coupling = ko.coarse_correction("exact")
    models = (ko.ggn(lambda p, x, f=f: ko.Normal(f(p, x))) for f in (mapped, in_front))
    got, want = (measured(model, mlp_params(), X, coupling=coupling) for model in models)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), got, want)


def test_rows_of_both_directions_are_exact_where_they_are_seen_together(x64):
    """Of `tanh(x w + b) w^T`: the sum of the block's entries in a coupling, the gradient from rows
    of all uses at once, and that from the rows of a shared pass.
    """
    model, params, x = MODELS["autoencoder"]
    estimator = ko.ggn(lambda p, x: ko.Normal(model(p, x)))
    layers = estimator.layers(params, x)
    _, across = measured(estimator, params, x, coupling=ko.coarse_correction("exact"))
    exact = oracles.dense_block(estimator, params, (x,), layers.layers[0])
    np.testing.assert_allclose(coarse_matrix(across), [[exact.sum()]], rtol=1e-10)
    together = gradients.block(gradients._weights, "together", rows=True)
    assert_gradients(lambda p, x: squares(model(p, x)), params, x, rtol=1e-10, weights=together)
    plan = oracles.plan(layers, block=ko.kronecker("cholesky"))

    @jax.jit
    def shared(params):
        step = estimator.value_and_grad(lambda prediction, y: prediction.mean_nll(y))
        _, grads, curvature = step(params, x, targets=x)
        return grads, curvature.gradient_rows(plan)[layers.layers[0]]

    grads, (a, g) = shared(params)
    want = jnp.concatenate([grads["w"], grads["b"][None]])
    np.testing.assert_allclose(a[0].T @ g[0], want, rtol=1e-10)


@pytest.mark.parametrize("name", ["autoencoder", "norms"])
def test_padding_counts_as_dropped(x64, name):
    """Of layers whose uses differ, too: examples of weight zero hold no numbers."""
    model, params, x = MODELS[name]
    estimator = ko.ggn(lambda p, x, weights: ko.Normal(model(p, x), weights=weights))
    plan = oracles.plan(estimator.layers(params, x, jnp.ones(N)))
    measure = jax.jit(lambda *args: estimator.at(params, *args).statistics(plan)[0])
    padded = jnp.concatenate([x, jnp.full((2, *x.shape[1:]), jnp.nan)])
    got = measure(padded, jnp.concatenate([jnp.ones(N), jnp.zeros(2)]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
        got,
        measure(x, jnp.ones(N)),
    )


def read_beside_the_tap(p, x):
    s = x @ p["w"]
    return ko.tap_dense(s + p["b"], x, p["w"], p["b"]) + jnp.sin(s)


def read_in_the_next_step(p, x):
    """The last step's is dropped, so that nothing but the carry shows it."""

    def step(carry, _):
        h, before = carry
        s = h @ p["w"]
        out = ko.tap_dense(s + p["b"], h, p["w"], p["b"])
        return (jnp.tanh(out + before), jnp.sin(s)), None

    (out, _), _ = jax.lax.scan(step, (x, x), None, length=3)
    return out


@pytest.mark.parametrize("model", [read_beside_the_tap, read_in_the_next_step])
def test_a_tap_that_sees_a_part_only_gives_way(x64, model):
    """What is between the product and the tapped output is read elsewhere, so the tap would miss a
    part of the gradient.
    """
    params = {"w": normal(3, 3), "b": normal(3)}
    layers = assert_gradients(lambda p, x: squares(model(p, x)), params, X, rtol=1e-10)
    assert {x.path: x.kind for x in layers} == {"w": "dense", "b": "scale_shift"}


def test_taps_linked_by_their_parameters_give_way_together(x64):
    """The first sees a part only; it shares its bias with the second, that its weight with the
    third.
    """

    def tap(s, a, w, b):
        return ko.tap_dense(s + b, a, w, b)

    def model(p, x):
        s = x @ p["w"]
        x = jnp.tanh(tap(s, x, p["w"], p["b"]) + jnp.sin(s))
        x = jnp.tanh(tap(x @ p["v"], x, p["v"], p["b"]))
        x = tap(x @ p["v"], x, p["v"], p["c"])
        return ko.tap_dense(x @ p["u"], x, p["u"])

    params = {name: normal(3, 3, seed=i) for i, name in enumerate("uvw")}
    params |= {"b": normal(3), "c": normal(3, seed=1)}
    layers = assert_gradients(lambda p, x: squares(model(p, x)), params, X, rtol=1e-10)
    kinds = {"u": "dense", "v": "dense", "w": "dense", "b": "scale_shift"}
    assert {x.path: x.kind for x in layers} in (kinds, kinds | {"c": "scale_shift"})
    assert not any(layer.partly for layer in layers)


def test_folders_whose_lines_nobody_asks_for_exist():
    assert all(map(os.path.isdir, code_lines._INSIDE))


def is_line_of_this_file(line):
    return re.fullmatch(r"(?:.*/)?test_program.py:\d+", line) is not None


def test_errors_say_where_in_the_code():
    """A tapped layer in a loop; no layer at all; complex parameters and those of integers."""
    w, x = jnp.eye(3), jnp.ones((N, 3))
    step = lambda w, h: ko.tap_dense(h @ w, h, w)
    loop = lambda w, x: jax.lax.while_loop(lambda h: h.sum() < 9, lambda h: step(w, h), x)
    with pytest.raises(ValueError, match=r"runs inside `while` \(.*test_program.py:\d+\)"):
        ko.ggn(lambda w, x: ko.Normal(loop(w, x))).layers(w, x)
    with pytest.raises(ValueError, match=r"\(root\) \(used by sin at .*test_program.py:\d+\)"):
        ko.ggn(lambda w, x: ko.Normal(x @ jnp.sin(w))).layers(w, x)
    model = lambda p, x: ko.Normal(jnp.abs(x @ p["w"] @ p["complex"]) * p["counts"])
    params = {"w": w, "complex": w + 1j, "counts": jnp.arange(3)}
    layers = ko.ggn(model).layers(params, x)
    assert [u.path for u in layers.uncovered] == ["complex", "counts"]
    assert all(is_line_of_this_file(u.where) for u in layers.uncovered)
    assert "test_program.py:" in str(layers)


def test_what_no_equation_shows_is_named():
    """Uses inside a branch or a rule of its own, and those that are not linear in the parameter."""

    def chosen(stack, x):
        return jax.lax.dynamic_index_in_dim(stack, jnp.int32(x.sum() > 0), keepdims=False)

    def model(p, x):
        hidden = jax.lax.cond(x.sum() > 0, lambda: x @ p["branch"], lambda: x)
        hidden = hidden @ p["partly"] + jnp.sin(p["partly"])[0]
        shifted = 1 + p["scale"]
        hidden = hidden * shifted + jnp.exp(shifted)
        hidden = hidden @ (p["v"] / jnp.linalg.norm(p["v"])) @ chosen(p["stack"], x)
        return ko.Normal(hidden * jnp.fft.rfft(p["filter"], 2).real)  # in functions of JAX

    square = jnp.eye(3)
    params = {"branch": square, "partly": square, "scale": jnp.ones(3), "v": square, "idle": square}
    params |= {"stack": jnp.ones((2, 3, 2)), "filter": jnp.ones(1)}
    layers = ko.ggn(model).layers(params, jnp.ones((N, 3)))
    assert {layer.path: layer.notes for layer in layers} == {
        "partly": ("partly also used by sin: not measured",),
        "scale": ("scale also used by exp: not measured",),
    }
    reasons = {u.path: u.reason for u in layers.uncovered}
    assert set(reasons) == {"branch", "v", "idle", "stack", "filter"}
    assert "cond" in reasons["branch"] and "div" in reasons["v"]
    assert "dynamic_slice" in reasons["stack"] and reasons["idle"] == "not used"
    lines = {u.path: u.where for u in layers.uncovered}
    assert lines.pop("idle") == "" and all(map(is_line_of_this_file, lines.values()))
    message = r"(?s)branch \(3, 3\): used by cond.*test_program.py:\d+\).*partly also used by sin"
    with pytest.raises(ValueError, match=message):
        ko.kfac(layers, learning_rate=0.1, uncovered="raise")
