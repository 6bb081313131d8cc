"""Flax models and likelihoods by name."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import linen as nn

import kfac_optax as ko
from kfac_optax.experiments import data


class LinearMLP(nn.Module):
    """Linear network with batch normalization after each of its `depth` hidden layers."""

    depth: int
    width: int
    outputs: int
    bn_momentum: float = 0.9

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps inputs `[N, features]` to logits `[N, outputs]`."""

        def dense(width: int) -> nn.Dense:
            return nn.Dense(width, use_bias=False, kernel_init=nn.initializers.he_uniform())

        for _ in range(self.depth):
            x = dense(self.width)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=self.bn_momentum)(x)
        return dense(self.outputs)(x)


class MLP(nn.Module):
    """Fully connected network with biases and tanh between its layers."""

    widths: tuple[int, ...]
    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps inputs `[N, features]` to logits `[N, outputs]`."""
        del train  # nothing in this model behaves differently in evaluation
        for width in self.widths:
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(self.outputs)(x)


MODELS = {"linear_mlp": LinearMLP, "mlp": MLP}


class Likelihood(NamedTuple):
    """How logits explain targets.

    Attributes:
        distribution: logits to the library's likelihood, for the Fisher.
        nll: logits and targets to the negative log-likelihood of each example, `[N]`.
        correct: logits and targets to the fraction of right answers of each example, `[N]`.
        outputs: targets to the number of logits that a model of them needs.
    """

    distribution: Callable[[jax.Array], Any]
    nll: Callable[[jax.Array, jax.Array], jax.Array]
    correct: Callable[[jax.Array, jax.Array], jax.Array]
    outputs: Callable[[jax.Array], int]


def _bernoulli(logits: jax.Array) -> Any:
    return ko.Bernoulli(logits=logits)


def _categorical(logits: jax.Array) -> Any:
    return ko.Categorical(logits=logits)


LIKELIHOODS = {
    "bernoulli": Likelihood(
        distribution=_bernoulli,
        nll=lambda logits, y: optax.sigmoid_binary_cross_entropy(logits, y).sum(-1),
        correct=lambda logits, y: jnp.mean((logits > 0) == (y > 0.5), axis=-1),
        outputs=lambda y: y.shape[-1],
    ),
    "categorical": Likelihood(
        distribution=_categorical,
        nll=optax.softmax_cross_entropy_with_integer_labels,
        correct=lambda logits, y: (logits.argmax(-1) == y).astype(jnp.float32),
        outputs=lambda y: int(y.max()) + 1,
    ),
}


def build(config: ml_collections.ConfigDict, *, outputs: int) -> nn.Module:
    """Builds the model that `config.name` names; the other entries are its attributes.

    Args:
        config: the `model` section of an experiment.
        outputs: number of logits.

    Returns:
        A module that is called as `module(x, train=...)`.

    Raises:
        ValueError: the name is unknown.
    """
    options = config.to_dict()
    return data.select(MODELS, options.pop("name"), "config.model.name")(outputs=outputs, **options)


def init(model: nn.Module, key: jax.Array, x: jax.Array) -> tuple[Any, Any]:
    """Initial parameters, and the other variables (`{}` for a model without batch statistics)."""
    variables = dict(model.init(key, x, train=True))
    return variables.pop("params"), variables


def apply(model: nn.Module, params: Any, model_state: Any, x: jax.Array, *, train: bool) -> tuple[Any, Any]:
    """Logits, and the variables besides the parameters as the call leaves them."""
    variables = {"params": params, **model_state}
    if train and model_state:
        return model.apply(variables, x, train=True, mutable=list(model_state))
    return model.apply(variables, x, train=train), model_state


def targets_per_example(y: jax.Array) -> int:
    """Number of targets that the likelihood of one example sums over."""
    return math.prod(y.shape[1:])
