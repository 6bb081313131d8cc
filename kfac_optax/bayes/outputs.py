"""What a Gaussian over the parameters says about the outputs of a model, linearised at its mean."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._tree import named_leaves, replace_leaves
from kfac_optax._types import PyTree
from kfac_optax._validate import check_choice
from kfac_optax.inspection.examples import map_examples
from kfac_optax.likelihoods import Bernoulli, Categorical, Normal
from kfac_optax.linalg.factorize import psd_root

APPROXIMATIONS = ("probit", "sample")


class Outputs(NamedTuple):
    """Gaussian over the outputs of every example, with the outputs of one raveled to `C`."""

    mean: Float[Array, "N *event"]
    covariance: Float[Array, "N C C"]

    @property
    def variance(self) -> Float[Array, "N *event"]:
        """Of every output on its own."""
        # [N, C, C] -> [N, C] -> [N, *event]; rounding may leave a variance below zero
        diagonal = jnp.diagonal(self.covariance, axis1=-2, axis2=-1)
        return jnp.maximum(diagonal, 0).reshape(self.mean.shape)


def linearized(
    outputs: Callable[..., Array],
    mean: PyTree,
    names: list[str],
    covariance: Callable[[PyTree], PyTree],
    args: tuple[PyTree, ...],
    batch_size: int,
) -> Outputs:
    """`J Sigma J^T` of every example, `J` the Jacobian of its outputs at the mean.

    Args:
      outputs: `(params, *args) -> [N, *event]`.
      mean: parameters.
      names: paths of those that are random.
      covariance: `tree -> Sigma tree`.
      args: further arguments, cut up by `map_examples`.
      batch_size: how many at the same time.
    """
    # parameters without a block do not vary
    random = _covered(mean, names)
    zeros = jax.tree.map(jnp.zeros_like, mean)

    def spread(row: dict[str, Array]) -> dict[str, Array]:
        return _covered(covariance(replace_leaves(zeros, row)), names)

    def of_example(*own: PyTree) -> tuple[Array, Array]:
        def raveled(named: dict[str, Array]) -> Array:
            return jnp.ravel(outputs(replace_leaves(mean, named), *own))

        # rows of the Jacobian, [C, *shape] for every parameter
        value, pull = jax.vjp(raveled, random)
        columns = jnp.eye(len(value), dtype=value.dtype)
        (jacobian,) = jax.vmap(pull)(columns)
        # Sigma J^T, row by row
        moved = jax.vmap(spread)(jacobian)
        return value, _gram(jacobian, moved)

    # J (Sigma J^T), examples one after another
    value, form = map_examples(of_example, args, batch_size)
    shape = jax.eval_shape(outputs, mean, *args).shape
    return Outputs(value.reshape(shape), form)


def _covered(tree: PyTree, names: list[str]) -> dict[str, Array]:
    leaves = named_leaves(tree)
    return {name: x for name, x in leaves.items() if name in names}


def _gram(left: dict[str, Array], right: dict[str, Array]) -> Float[Array, "C C"]:
    """Sums over all parameters of products of rows `[C, ...]`, made symmetric."""
    total: Any = 0.0
    for name, x in left.items():
        y = right[name]
        # [C, ...] to [C, n]
        x = x.reshape(len(x), -1)
        y = y.reshape(len(y), -1)
        total += jnp.matmul(x, y.T, precision="highest")
    return (total + total.T) / 2


def averaged(
    head: Any,
    outputs: Outputs,
    approximation: str,
    key: jax.Array | None,
    samples: int,
) -> Any:
    """A likelihood with the spread of its outputs in it, see `Posterior.predict`.

    Raises:
      TypeError: another likelihood than `Normal`, `Categorical` or `Bernoulli`.
      ValueError: an unknown word; no key to draw with.
    """
    check_choice("Posterior.predict", "approximation", approximation, APPROXIMATIONS)
    if isinstance(head, Normal):  # exact: a Gaussian of Gaussian mean
        variance = jnp.square(head.scale) + outputs.variance
        scale = jnp.sqrt(variance)
        return dataclasses.replace(head, mean=outputs.mean, scale=scale)
    if not isinstance(head, Categorical | Bernoulli):
        raise TypeError(
            f"Posterior.predict: the model predicts a {type(head).__name__}; expected Normal, "
            "Categorical or Bernoulli. Use Posterior.outputs, or average over Posterior.sample."
        )
    if approximation == "probit":
        # E[sigmoid(f)] ~ sigmoid(f / sqrt(1 + pi s^2 / 8))
        shrink = jnp.sqrt(1 + math.pi / 8 * outputs.variance)
        return dataclasses.replace(head, logits=outputs.mean / shrink)
    if key is None:
        raise ValueError("Posterior.predict: got key=None with approximation='sample'; pass a key.")
    # averages of probabilities by their logarithms
    logits = _draw(outputs, key, samples)

    def mean_of_exp(x: Array) -> Array:
        return jax.nn.logsumexp(x, axis=0) - math.log(samples)

    # logits of the mean probabilities
    if isinstance(head, Categorical):
        log_means = mean_of_exp(jax.nn.log_softmax(logits))
        return dataclasses.replace(head, logits=log_means)
    # log odds of the mean probability, without 1 - p
    log_one = mean_of_exp(jax.nn.log_sigmoid(logits))
    log_zero = mean_of_exp(jax.nn.log_sigmoid(-logits))
    return dataclasses.replace(head, logits=log_one - log_zero)


def _draw(
    outputs: Outputs,
    key: jax.Array,
    samples: int,
) -> Float[Array, "S N *event"]:
    count = outputs.covariance.shape[:2]
    # f + R z with R R^T the covariance of one example, [N, C, C]
    roots, _ = jax.vmap(psd_root)(outputs.covariance)
    noise = jax.random.normal(key, (samples, *count), roots.dtype)
    spread = jnp.einsum("ncd,snd->snc", roots, noise, precision="highest")
    return outputs.mean + spread.reshape(samples, *outputs.mean.shape)
