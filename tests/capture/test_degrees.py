"""Layers without a scale: behind a normalisation the prediction is the same for any multiple."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kfac_optax as ko
from kfac_optax._tree import named_leaves, present, replace_leaves
from kfac_optax._types import Part
from kfac_optax.capture.jaxpr.shared_leaves import Owner, SharedLeaf
from kfac_optax.capture.jaxpr.views import of_parameter
from kfac_optax.estimators.spec import trace_shared

N, WIDTH = 6, 4
# what epsilons of 1e-6 may leave of a factor of three
BOUND = 1e-3


def normal(*shape, seed=0):
    """NumPy draws in double precision, whatever JAX is set to while tests are collected."""
    return np.random.default_rng(seed + sum(shape)).normal(size=shape)


def rms_norm(x, eps=1e-6):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + eps)


def standardized(x, axis=0, eps=1e-6):
    """Batch norm along the first axis, layer norm along the last."""
    return (x - x.mean(axis, keepdims=True)) / jnp.sqrt(x.var(axis, keepdims=True) + eps)


def dense(p, x):
    return x @ p["w"] + p["b"]


def weights(*names, stack=()):
    """Dense layers of one width; a name that ends in an underscore has no bias."""
    params = {}
    for seed, name in enumerate(names):
        params[name] = {"w": normal(*stack, WIDTH, WIDTH, seed=10 * seed)}
        if not name.endswith("_"):
            params[name]["b"] = normal(*stack, WIDTH, seed=10 * seed + 5)
    return params


def layers_of(model, params, *args):
    return ko.fisher(lambda p, *args: ko.Normal(model(p, *args))).layers(params, *args)


def multiplied(params, layer, factor):
    """The parameters with those of one layer multiplied."""
    leaves = named_leaves(params)
    pairs = [(layer.kernel, layer.part), (layer.bias, layer.bias_part)]
    new = {}
    for name, part in pairs:
        if name is not None:
            new[name] = leaves[name].at[layer.box(part)].multiply(factor)
    return replace_leaves(params, new)


class Case(NamedTuple):
    """A model, and which layers of it have no scale."""

    model: Callable[..., jax.Array]
    params: Any
    shape: tuple[int, ...]
    free: set[str]


def deep(behind):
    """Two hidden layers with something behind each, and a head."""

    def model(p, x):
        h = behind(dense(p["a"], x))
        return dense(p["c"], behind(dense(p["b"], h)))

    return model


# what stands behind a layer, and whether it takes the scale away
BEHIND = {
    "batch": (standardized, True),
    "layer": (lambda h: standardized(h, -1), True),
    "rms": (rms_norm, True),
    "relu": (lambda h: standardized(jax.nn.relu(h)), True),
    "leaky": (lambda h: rms_norm(jax.nn.leaky_relu(h)), True),
    "length": (lambda h: h / jnp.maximum(jnp.linalg.norm(h, axis=-1, keepdims=True), 1e-12), True),
    "power": (lambda h: h / jnp.sum(jnp.abs(h) ** 3.0, -1, keepdims=True) ** (1 / 3), True),
    "largest": (lambda h: h / jnp.abs(h).max(-1, keepdims=True), True),
    "signs": (lambda h: jnp.sign(h) + (h > 0), True),
    "winner": (lambda h: rms_norm(h * jax.nn.one_hot(jnp.argmax(h, -1), WIDTH)), True),
    "sorted": (lambda h: rms_norm(jnp.sort(h, -1)), True),
    "masked": (lambda h: rms_norm(jnp.where(jnp.arange(WIDTH) < 3, h, 0)), True),
    "kept": (lambda h: rms_norm(jnp.where(h > 0, h, 0.5 * h)), True),
    "pooled": (lambda h: rms_norm(nn.max_pool(h[:, :, None], (2,), padding="SAME")[..., 0]), True),
    "padded": (lambda h: rms_norm(jnp.pad(h, ((0, 0), (1, 1))))[:, 1:-1], True),
    "recomputed": (jax.checkpoint(lambda h: rms_norm(jax.jit(jax.nn.relu)(h))), True),
    "branch": (lambda h: jax.lax.cond(jnp.arange(9)[3] < N, rms_norm, standardized, h), True),
    "tanh": (lambda h: rms_norm(jnp.tanh(h)), False),
    "gelu": (lambda h: rms_norm(jax.nn.gelu(h)), False),
    "relu6": (lambda h: rms_norm(jax.nn.relu6(h)), False),
    "shifted": (lambda h: rms_norm(h + 1.0), False),
    "threshold": (lambda h: rms_norm(jnp.where(h > 0.5, h, 0)), False),
    "halfway": (lambda h: h / (jnp.abs(h) + 1), False),
    "nothing": (lambda h: h, False),
    "unequal": (lambda h: jax.lax.cond(jnp.arange(9)[3] < N, lambda h: h, rms_norm, h), False),
    "softmax": (lambda h: jax.nn.softmax(h, -1), False),
    "rounded": (lambda h: rms_norm(jnp.round(h)), False),
    "filled": (lambda h: rms_norm(h.at[:, 9].get(mode="fill", fill_value=1.0)[:, None] + h), False),
}


def attention(p, x):
    """Queries and keys with a norm of their own, x: `[N, T, WIDTH]`."""
    q, k = rms_norm(dense(p["q"], x)), rms_norm(dense_(p["k_"], x))
    scores = jax.nn.softmax(5.0 * q @ k.swapaxes(-1, -2))
    return dense(p["o"], scores @ dense(p["v"], x))


def dense_(p, x):
    return x @ p["w"]


def pre_norm(p, x):
    x = dense(p["in"], x)
    return x + dense(p["down"], jax.nn.relu(dense(p["up"], rms_norm(x))))


def post_norm(p, x):
    return dense(p["out"], rms_norm(x + dense(p["inner"], x)))


def tied(p, x):
    x = rms_norm(jax.nn.relu(dense(p["in"], x)))
    for _ in range(2):
        x = rms_norm(dense_(p["twice_"], x))
    return dense(p["out"], x)


def with_head(p, x):
    """The same weight the other way round, behind which nothing follows."""
    return rms_norm(x @ p["twice_"]["w"]) @ p["twice_"]["w"].T


def scale_again(p, x):
    """A norm's scale takes no part where a layer without bias and another norm follow."""
    x = jax.nn.relu(rms_norm(dense(p["a"], x)) * p["gain"]["w"])
    return dense(p["b"], rms_norm(dense_(p["c_"], x)))


def over_layers(p, x):
    step = lambda h, layer: (rms_norm(jax.nn.relu(dense(layer, h))), None)
    h = jax.lax.scan(jax.checkpoint(step), x, p["stack"])[0]
    return dense(p["out"], h)


def over_layers_unstable(p, x):
    """Nothing behind each step, so that the degree grows."""
    h = jax.lax.scan(lambda h, layer: (h @ layer["w"], None), x, p["stack_"])[0]
    return dense(p["out"], h)


def over_time(p, x):
    """A linear state that starts from zeros, whose degree stays one."""
    step = lambda h, x: (0.5 * h + dense_(p["in_"], x), None)
    h = jax.lax.scan(step, jnp.zeros((len(x), WIDTH)), x.swapaxes(0, 1))[0]
    return dense(p["out"], rms_norm(h))


def over_time_normed(p, x):
    """A state that has no degree meets an input that has one."""
    step = lambda h, x: (rms_norm(h + dense_(p["in_"], x)), None)
    h = jax.lax.scan(step, jnp.zeros((len(x), WIDTH)), x.swapaxes(0, 1))[0]
    return dense(p["out"], h)


def self_attention(qkv, x):
    q, k, v = (x @ w for w in jnp.split(qkv, 3, 1))
    return jax.nn.softmax(rms_norm(q) @ rms_norm(k).swapaxes(-1, -2)) @ v


def fused(p, x):
    """Queries, keys and values in one parameter, the layers of a network in another."""
    h = self_attention(p["qkv"], x)
    return rms_norm(h @ p["stack"][0] + p["shift"][0]) @ p["stack"][1]


def fused_stack(p, x):
    """Split inside of a scan, and in front of one."""
    x = jax.lax.scan(lambda h, w: (self_attention(w, h), None), x, p["inside"])[0]
    step = lambda h, w: (rms_norm(h @ w[0]) + h @ w[1], None)
    halves = jnp.split(p["before"], 2, 2)
    return dense(p["out"], jax.lax.scan(step, x, halves)[0])


def weight_norm(p, x):
    v = p["v"]
    h = x @ (p["gain"] * v / jnp.linalg.norm(v, axis=0))
    return dense(p["out"], jnp.tanh(h))


SEQUENCE = (N, 3, WIDTH)
ARCHITECTURES = {
    "attention": (attention, weights("q", "k_", "v", "o"), SEQUENCE, {"q", "k_"}),
    "pre-norm": (pre_norm, weights("in", "up", "down"), (N, WIDTH), set()),
    "post-norm": (post_norm, weights("inner", "out"), (N, WIDTH), set()),
    "tied": (tied, weights("in", "twice_", "out"), (N, WIDTH), {"in", "twice_"}),
    "tied head": (with_head, weights("twice_"), (N, WIDTH), set()),
    "scale": (
        scale_again,
        weights("a", "b", "c_") | {"gain": {"w": normal(WIDTH)}},
        (N, WIDTH),
        {"a", "gain", "c_"},
    ),
    "stack": (
        over_layers,
        weights("stack", stack=(3,)) | weights("out"),
        (N, WIDTH),
        {"stack"},
    ),
    "stack of nothing": (
        over_layers_unstable,
        weights("stack_", stack=(3,)) | weights("out"),
        (N, WIDTH),
        set(),
    ),
    "time": (over_time, weights("in_", "out"), SEQUENCE, {"in_"}),
    "normed state": (over_time_normed, weights("in_", "out"), SEQUENCE, set()),
    "fused": (
        fused,
        {
            "qkv": normal(WIDTH, 3 * WIDTH),
            "stack": normal(2, WIDTH, WIDTH),
            "shift": normal(1, WIDTH),
        },
        SEQUENCE,
        {"qkv[:, 0:4]", "qkv[:, 4:8]", "stack[0]"},
    ),
    "fused stack": (
        fused_stack,
        {"inside": normal(2, WIDTH, 3 * WIDTH), "before": normal(2, WIDTH, 2 * WIDTH)}
        | weights("out"),
        SEQUENCE,
        {"inside[:, 0:4]", "inside[:, 4:8]", "before[:, 0:4]"},
    ),
    "weight norm": (
        weight_norm,
        {"v": normal(WIDTH, WIDTH), "gain": normal(WIDTH)} | weights("out"),
        (N, WIDTH),
        set(),
    ),
}


def cases():
    found = {name: Case(*case) for name, case in ARCHITECTURES.items()}
    for name, (behind, free) in BEHIND.items():
        params = weights("a", "b", "c")
        found[name] = Case(deep(behind), params, (N, WIDTH), {"a", "b"} if free else set())
    return found


CASES = cases()


@pytest.fixture(scope="module")
def measured():
    """Layers of all cases, and how far each, multiplied by three, moves the prediction; compiled
    once.
    """
    with jax.enable_x64(True):
        x = {name: jnp.asarray(normal(*case.shape)) for name, case in CASES.items()}
        params = {name: jax.tree.map(jnp.asarray, case.params) for name, case in CASES.items()}
        layers = {
            name: layers_of(case.model, params[name], x[name]) for name, case in CASES.items()
        }
        run = lambda p: {name: case.model(p[name], x[name]) for name, case in CASES.items()}
        return layers, changes(jax.jit(run), layers, params)


def changes(run, layers, params):
    """Relative change of the prediction by model and layer."""
    before = run(params)
    found = {name: [] for name in layers}
    for i in range(max(map(len, layers.values()))):
        some = [name for name in layers if i < len(layers[name])]
        scaled = {name: multiplied(params[name], layers[name].layers[i], 3.0) for name in some}
        after = run(params | scaled)
        for name in some:
            largest = np.abs(before[name]).max()
            found[name].append(float(np.abs(after[name] - before[name]).max() / largest))
    return found


@pytest.mark.parametrize("name", CASES)
def test_layers_without_a_scale_are_those_whose_multiple_predicts_the_same(measured, name):
    layers, moved = measured[0][name], measured[1][name]
    free = {layer.path: layer.scale_free for layer in layers}
    assert {path for path in free if free[path]} == CASES[name].free
    assert [change < BOUND for change in moved] == list(free.values())


class Hidden(nn.Module):
    """A layer and its batch norm, for `nn.scan` too."""

    train: bool = True

    @nn.compact
    def __call__(self, x, _=None):
        x = nn.relu(nn.Dense(WIDTH)(x))
        return nn.BatchNorm(use_running_average=not self.train)(x), None


class Wrapped(nn.Module):
    """Hidden layers behind a lifted transformation of Flax."""

    lift: Callable[..., Any]
    train: bool = True

    @nn.compact
    def __call__(self, x):
        x, _ = self.lift(Hidden)(self.train, name="hidden")(x, None)
        return nn.Dense(3, name="head")(x)


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(2)(nn.Conv(4, (3,))(x)))
        x = nn.avg_pool(nn.LayerNorm()(nn.Conv(4, (3,), use_bias=False)(x)), (2,))
        x = nn.RMSNorm()(nn.relu(nn.WeightNorm(nn.Dense(WIDTH))(x)))
        return nn.Dense(3, name="head")(x.mean(1))


def linen_case(module, shape):
    """A predictor in training mode, and shapes of its parameters and batch."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    params = variables.pop("params")
    stats = jax.tree.map(lambda v: np.ones(v.shape, v.dtype), variables)

    def predict(params, x):
        out, new = module.apply({"params": params, **stats}, x, mutable=["batch_stats"])
        return ko.Normal(out), new

    return predict, params, x


scan_of = functools.partial(
    nn.scan, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=2
)
LIFTS = {"plain": lambda module: module, "jit": nn.jit, "remat": nn.remat, "scan": scan_of}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("lift", LIFTS)
def test_batch_norm_takes_the_scale_away_in_training_mode_alone(lift, train):
    predict, params, x = linen_case(Wrapped(LIFTS[lift], train), (N, WIDTH))
    # new statistics of the batch have the scale of the layer, but are no prediction
    for estimator in (
        ko.fisher(lambda p, x: predict(p, x)[0]),
        ko.fisher(predict, has_aux=True),
    ):
        free = {layer.path: layer.scale_free for layer in estimator.layers(params, x)}
        assert free == {"hidden/Dense_0": train, "hidden/BatchNorm_0": False, "head": False}


def test_shared_pass_finds_the_same_layers():
    predict, params, x = linen_case(Wrapped(nn.jit), (N, WIDTH))
    estimator = ko.fisher(predict, has_aux=True)
    traced, apart = trace_shared(estimator.spec, params, (x,))
    assert not apart and traced.layers == estimator.layers(params, x)


def test_norms_of_flax_behind_convolutions():
    predict, params, x = linen_case(Convolutions(), (N, 6, 2))
    layers = ko.fisher(predict, has_aux=True).layers(params, x)
    free = {layer.path for layer in layers if layer.scale_free}
    # the gain of a weight norm is a scale as any other, and the directions are no layer
    gain = "WeightNorm_0/Dense_0/kernel"
    assert free == {"Conv_0", "GroupNorm_0", "Conv_1", gain}


class NnxNetwork(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Conv(2, WIDTH, (3,), rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.hidden(x))).mean(1))


def test_batch_norm_of_nnx():
    network = nnx.eval_shape(lambda: NnxNetwork(nnx.Rngs(0)))
    graph, params, rest = nnx.split(network, nnx.Param, ...)
    predict = lambda params, x, rest: ko.Normal(nnx.merge(graph, params, rest)(x))
    x = jax.ShapeDtypeStruct((N, 6, 2), jnp.float32)
    layers = ko.fisher(predict).layers(params, x, rest)
    free = {layer.path: layer.scale_free for layer in layers}
    assert free == {"hidden": True, "norm": False, "head": False}


def test_loop_of_unknown_length_proves_nothing():
    def model(p, x):
        step = lambda carry: (carry[0] + 1, 2 * carry[1])
        h = jax.lax.while_loop(lambda carry: carry[0] < 2, step, (0, x @ p["a"]))[1]
        return rms_norm(h) @ p["b"]

    params = {"a": np.ones((2, 2)), "b": np.ones((2, 1))}
    layers = layers_of(model, params, np.ones((3, 2)))
    assert not any(layer.scale_free for layer in layers)


def test_epsilon_of_one_in_a_thousand_counts_as_nothing_and_one_does_not(x64):
    params = {"a": normal(WIDTH, WIDTH), "b": normal(WIDTH, 2)}
    x = 100 * normal(N, WIDTH)
    for eps, free in [(1e-3, True), (1e-2, True), (0.1, False)]:
        model = lambda p, x, eps=eps: standardized(x @ p["a"], -1, eps) @ p["b"]
        layers = layers_of(model, params, x)
        assert [layer.scale_free for layer in layers] == [free, False]


def test_claim_is_about_kernel_and_bias_together():
    """Without its bias (masked, say) a layer has a scale."""
    params = {"w": np.ones((2, 2)), "b": np.ones(2), "v": np.ones((2, 1))}
    model = lambda p, x: rms_norm(x @ p["w"] + p["b"]) @ p["v"]
    layers = layers_of(model, params, np.ones((3, 2)))
    assert layers.layers[0].scale_free
    kernel_alone = present(layers, {"w": params["w"], "v": params["v"]})
    assert [layer.scale_free for layer in kernel_alone] == [False, False]


def test_boxes_of_a_shared_parameter():
    """What a value is known to have of each owner: all of it, nothing, or who knows."""
    left, right = Part((3, 4), (0, 0), (3, 2)), Part((3, 4), (0, 2), (3, 2))
    whole = SharedLeaf(of_parameter(0, (3, 4)), (Owner(0, left), Owner(1, right), Owner(2)))
    assert (whole.having_all(), whole.having_some()) == ({2}, {0, 1})
    # columns 0:1, 1:3
    for start, size, every, some in [(0, 1, {0, 2}, set()), (1, 2, {2}, {0, 1})]:
        box = whole._replace(view=whole.view.cut((0, start), (3, size)))
        assert (box.having_all(), box.having_some()) == (every, some)


# one stage of a random network: parameters `p` and rows `h` of one width
STAGES = {
    "dense": dense,
    "dense_": dense_,
    "relu": lambda p, h: jax.nn.relu(h),
    "tanh": lambda p, h: jnp.tanh(h),
    "rms": lambda p, h: rms_norm(h),
    "batch": lambda p, h: standardized(h),
    "scale": lambda p, h: h * p["b"],
    "residual": lambda p, h: h + dense(p, h),
    "residual_": lambda p, h: rms_norm(h) + jax.nn.relu(dense_(p, h)),
    "softmax": lambda p, h: jax.nn.softmax(h, -1),
}


def random_network(seed):
    """Stages drawn with norms in every second place, as many as matter."""
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(3):
        drawn += [rng.choice(list(STAGES)), rng.choice(["dense", "dense_", "relu", "rms", "batch"])]

    def model(p, x):
        for i, name in enumerate(drawn):
            x = STAGES[name](p[f"{i}"], x)
        return dense(p["head"], x)

    names = [str(i) for i in range(len(drawn))]
    return model, weights(*names, "head")


def test_no_false_claim_about_random_networks():
    """Forty networks, in double precision: what is said to have no scale has none."""
    with jax.enable_x64(True):
        x = jnp.asarray(normal(N, WIDTH))
        networks = {str(seed): random_network(seed) for seed in range(40)}
        params = {name: jax.tree.map(jnp.asarray, p) for name, (_, p) in networks.items()}
        layers = {name: layers_of(model, params[name], x) for name, (model, _) in networks.items()}
        run = lambda p: {name: model(p[name], x) for name, (model, _) in networks.items()}
        moved = changes(jax.jit(run), layers, params)
    claims = 0
    for name, found in layers.items():
        for layer, change in zip(found, moved[name], strict=True):
            claims += layer.scale_free
            assert change < BOUND or not layer.scale_free, (name, layer.path)
    assert claims > 20
