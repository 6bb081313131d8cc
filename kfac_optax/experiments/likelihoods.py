"""How logits explain targets: losses, scores and the library's distributions, by name."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import kfac_optax as ko


class Likelihood(NamedTuple):
    """How logits explain targets.

    Attributes:
        distribution: logits to the library's likelihood, for the Fisher.
        nll: logits and targets to the negative log-likelihood of each term, `[*terms]`; training
          minimises its mean.
        score: logits and targets to the accuracy or error of each term, `[*terms]`.
        outputs: targets to the number of logits that a model of them needs.
        targets: targets to the number of them that reported losses are a mean over, within a term.
        error: whether the score is an error, the mean squared one, and not an accuracy.
    """

    distribution: Callable[[jax.Array], Any]
    nll: Callable[[jax.Array, jax.Array], jax.Array]
    score: Callable[[jax.Array, jax.Array], jax.Array]
    outputs: Callable[[jax.Array], int]
    targets: Callable[[jax.Array], int]
    error: bool = False


def _bernoulli(logits: jax.Array) -> Any:
    return ko.Bernoulli(logits=logits)


def _bernoulli_nll(logits: jax.Array, y: jax.Array) -> jax.Array:
    return optax.sigmoid_binary_cross_entropy(logits, y).sum(-1)


def _categorical(logits: jax.Array) -> Any:
    return ko.Categorical(logits=logits)


LIKELIHOODS = {
    "bernoulli": Likelihood(
        distribution=_bernoulli,
        nll=_bernoulli_nll,
        score=lambda logits, y: jnp.mean((logits > 0) == (y > 0.5), axis=-1),
        outputs=lambda y: y.shape[-1],
        # So that losses compare across target dimensions; training uses the sum, which the Fisher
        # belongs to.
        targets=lambda y: math.prod(y.shape[1:]),
    ),
    # Pixels between 0 and 1 as probabilities; the loss is reported as it is trained, summed over
    # the pixels.
    "pixels": Likelihood(
        distribution=_bernoulli,
        nll=_bernoulli_nll,
        score=lambda logits, y: jnp.mean((jax.nn.sigmoid(logits) - y) ** 2, axis=-1),
        outputs=lambda y: y.shape[-1],
        targets=lambda y: 1,
        error=True,
    ),
    # One class for an example `[N]`, or for each of its positions `[N, T]`.
    "categorical": Likelihood(
        distribution=_categorical,
        nll=optax.softmax_cross_entropy_with_integer_labels,
        score=lambda logits, y: (logits.argmax(-1) == y).astype(jnp.float32),
        outputs=lambda y: int(y.max()) + 1,
        targets=lambda y: 1,
    ),
}
