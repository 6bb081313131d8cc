"""Training steps of one network by optimizer and kind of step."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import kfac_optax as ko
from benchmarks import networks

RATE = 1e-3
# kind of step: static arguments of `update`; `None` leaves the decision to the traced schedule
KINDS: dict[str, dict[str, bool] | None] = {
    "plain": {"measure": False, "refresh": False},
    "statistics": {"measure": True, "refresh": False},
    "inverses": {"measure": True, "refresh": True},
    "traced": None,
}
ADAPTIVE_KINDS: dict[str, dict[str, bool] | None] = {
    **{kind: due and due | {"adapt": False} for kind, due in KINDS.items()},
    "damping": {"measure": False, "refresh": False, "adapt": True},
}


class Optimizer(NamedTuple):
    """`build(layers)`, and its kinds of step, of which one without curvature has only one."""

    build: Callable[[ko.Layers], Any]
    kinds: dict[str, dict[str, bool] | None] = {"traced": None}
    curvature: bool = False
    value: bool = False


def _then_sgd(preset: Callable[..., Any], **options: Any) -> Callable[[ko.Layers], Any]:
    def build(layers: ko.Layers) -> Any:
        return optax.chain(
            preset(layers, learning_rate=RATE, damping=1e-2, **options), optax.sgd(RATE, 0.9)
        )

    return build


OPTIMIZERS = {
    "sgd": Optimizer(lambda layers: optax.sgd(RATE, momentum=0.9)),
    "adam": Optimizer(lambda layers: optax.adam(RATE)),
    "muon": Optimizer(lambda layers: optax.contrib.muon(RATE)),
    "kfac_adaptive": Optimizer(ko.kfac_adaptive, ADAPTIVE_KINDS, True, True),
    "kfac, cholesky": Optimizer(_then_sgd(ko.kfac, inverse="cholesky"), KINDS, True),
    "kfac, newton": Optimizer(_then_sgd(ko.kfac, inverse="newton"), KINDS, True),
    "kfac, eigh": Optimizer(_then_sgd(ko.kfac, inverse="eigh"), KINDS, True),
    "kfac_two_level": Optimizer(_then_sgd(ko.kfac_two_level), KINDS, True),
    "soap": Optimizer(lambda layers: ko.soap(RATE)),
    "shampoo": Optimizer(lambda layers: ko.shampoo(RATE)),
}


class Tanh(nn.Module):
    """`depth` dense layers of one width."""

    depth: int
    width: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        del train
        for _ in range(self.depth):
            x = nn.tanh(nn.Dense(self.width)(x))
        return x


def dense_stack(depth: int = 8, width: int = 1024, batch: int = 512) -> networks.Network:
    """Layers of equal shape, which one batched call factorises."""
    x = jax.random.normal(jax.random.key(0), (batch, width))
    return networks._network(Tanh(depth, width), x, jnp.arange(batch) % width, ko.Categorical)


class Problem(NamedTuple):
    """A network with its loss, its curvature and its layers."""

    network: networks.Network
    fisher: ko.Estimator
    layers: ko.Layers

    @property
    def start(self) -> tuple[Any, Any]:
        """Parameters, and the rest of the model's variables."""
        rest = {k: v for k, v in self.network.variables.items() if k != "params"}
        return self.network.variables["params"], rest


def problem(network: networks.Network) -> Problem:
    fisher = ko.fisher(lambda params, rest, x: network.apply(params, rest, x)[0])
    params = network.variables["params"]
    rest = {k: v for k, v in network.variables.items() if k != "params"}
    return Problem(network, fisher, fisher.layers(params, rest, network.x))


def step_of(p: Problem, optimizer: Optimizer, due: dict[str, bool] | None) -> Callable[..., Any]:
    """`step(params, rest, state, x, y, key)`, which gives the first three anew."""
    tx = transformation(p, optimizer)

    def loss(params: Any, rest: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        likelihood, rest = p.network.apply(params, rest, x)
        return likelihood.mean_nll(y), rest

    def step(params: Any, rest: Any, state: Any, x: jax.Array, y: jax.Array, key: jax.Array):
        (value, new_rest), grads = jax.value_and_grad(loss, has_aux=True)(params, rest, x, y)
        extra: dict[str, Any] = dict(due or {})
        if optimizer.curvature:
            # adaptive optimizers take products with the curvature in every step
            needed = optimizer.value or due is None or due["measure"]
            extra["curvature"] = p.fisher.at(params, rest, x, key=key) if needed else None
        if optimizer.value:
            extra |= {"value": value, "value_fn": lambda q: loss(q, rest, x, y)[0]}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), new_rest, state

    return step


def transformation(p: Problem, optimizer: Optimizer) -> Any:
    return optax.with_extra_args_support(optimizer.build(p.layers))


def shapes(p: Problem, optimizer: Optimizer) -> tuple[Any, ...]:
    """What a step is called with, as shapes: nothing is computed or compiled."""
    params, rest = p.start
    state = jax.eval_shape(transformation(p, optimizer).init, params)
    known = (params, rest, state, p.network.x, p.network.y, jax.random.key(2))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), known)


@functools.cache
def autoencoder(small: bool) -> Problem:
    return problem((networks.SMALL if small else networks.NETWORKS)["autoencoder"]())


@functools.cache
def stack(small: bool) -> Problem:
    return problem(dense_stack(2, 8, 16) if small else dense_stack())


@functools.cache
def resnet20(small: bool) -> Problem:
    return problem(networks.SMALL["resnet8"]() if small else networks.NETWORKS["resnet20"]())
