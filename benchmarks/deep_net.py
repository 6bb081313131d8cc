"""The paper's deep linear net as compiled training steps, one per optimizer and schedule."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import kfac_optax as ko

LAYERS, WIDTH, BATCH, RATE = 64, 10, 512, 1e-3


class DeepLinear(nn.Module):
    layers: int = LAYERS

    @nn.compact
    def __call__(self, x):
        for _ in range(self.layers):
            x = nn.Dense(WIDTH, use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=False)(x)
        return nn.Dense(1, use_bias=False)(x)


class Problem(NamedTuple):
    params: Any
    batch_stats: Any
    x: jax.Array
    y: jax.Array
    fisher: ko.Estimator
    layers: ko.Layers


class Step(NamedTuple):
    """A compiled step with its state; `compile_s` covers tracing, lowering and compiling."""

    call: Callable[..., Any]
    state: Any
    compile_s: float


@functools.cache
def problem(depth: int = LAYERS) -> Problem:
    model = DeepLinear(depth)
    x = jax.random.normal(jax.random.key(0), (BATCH, 10))
    y = (x[:, :1] > 0).astype(jnp.float32)
    variables = model.init(jax.random.key(1), x)

    def predict(params, batch_stats, x):
        out, _ = model.apply(
            {"params": params, "batch_stats": batch_stats}, x, mutable=["batch_stats"]
        )
        return ko.Bernoulli(out)

    fisher = ko.fisher(predict)
    params, batch_stats = variables["params"], variables["batch_stats"]
    return Problem(params, batch_stats, x, y, fisher, fisher.layers(params, batch_stats, x))


def transformation(name: str, depth: int = LAYERS) -> optax.GradientTransformation:
    layers = problem(depth).layers
    common = dict(learning_rate=RATE, damping=1e-2, kl_clip=1e-3)
    pre = {
        "sgd": lambda: optax.identity(),
        "kfac": lambda: ko.kfac(layers, **common),
        "two_level": lambda: ko.kfac_two_level(layers, **common),
        "two_level_exact": lambda: ko.kfac_two_level(layers, coarse="exact", **common),
        "matmuls": lambda: bare_matmuls(layers),
    }[name]()
    return optax.chain(pre, optax.add_decayed_weights(1e-3), optax.sgd(RATE, momentum=0.9))


def bare_matmuls(layers: ko.Layers) -> optax.GradientTransformation:
    """What a plain K-FAC step cannot do without: stack the gradients, four products and a division,
    unstack.
    """

    def update(grads, state, params=None):
        kernels = [grads[layer.path]["kernel"] for layer in layers if layer.shape == (WIDTH, WIDTH)]
        left, right = state
        v = left.mT @ jnp.stack(kernels) @ right
        v = left @ (v / (left[:, :, :1] * right[:, :1] + 1e-2)) @ right.mT
        names = [layer.path for layer in layers if layer.shape == (WIDTH, WIDTH)]
        return grads | {name: {"kernel": v[i]} for i, name in enumerate(names)}, state

    square = sum(layer.shape == (WIDTH, WIDTH) for layer in layers)
    rotations = jnp.broadcast_to(jnp.eye(WIDTH), (square, WIDTH, WIDTH))
    return optax.GradientTransformation(lambda params: (rotations, rotations), update)


def make_step(
    name: str,
    *,
    measure: bool | None = None,
    refresh: bool | None = None,
    depth: int = LAYERS,
) -> Step:
    """`measure=None`: the traced schedule; otherwise a static step that does (or does not) measure
    and refresh.
    """
    p, tx = problem(depth), transformation(name, depth)
    curved = name not in ("sgd", "matmuls")

    def loss(params, batch_stats):
        out, updated = DeepLinear(depth).apply(
            {"params": params, "batch_stats": batch_stats}, p.x, mutable=["batch_stats"]
        )
        return ko.Bernoulli(out).mean_nll(p.y), updated["batch_stats"]

    @jax.jit
    def step(params, batch_stats, opt_state, key):
        (value, new_stats), grads = jax.value_and_grad(loss, has_aux=True)(params, batch_stats)
        extra = {}
        if curved:
            at = p.fisher.at(params, batch_stats, p.x, key=key) if measure in (None, True) else None
            extra = {"curvature": at, "refresh": None if measure is None else bool(refresh)}
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), new_stats, opt_state, value

    state = (p.params, p.batch_stats, tx.init(p.params))
    start = time.perf_counter()
    compiled = step.lower(*state, jax.random.key(2)).compile()
    return Step(compiled, state, time.perf_counter() - start)


def run(step: Step, steps: int) -> None:
    """Runs some steps and waits for them."""
    state, key = step.state, jax.random.key(3)
    for _ in range(steps):
        *state, _ = step.call(*state, key)
    jax.block_until_ready(state)
