"""Diagonal Gaussian posteriors that optimizers follow, and parameters drawn from them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfac_optax._tree import named_leaves, replace_leaves
from kfac_optax._types import PyTree
from kfac_optax._validate import check_number
from kfac_optax.engine.state import the_state


class DiagonalPosterior(NamedTuple):
    """What `vadam` and `vogn` keep: means over the steps, without a bias towards zero."""

    mean: PyTree  # of the gradients, weight decay included
    squares: PyTree  # of the squared gradients: curvature of the mean loss
    count: jax.Array  # shape=(), dtype=int32: gradients that are in them


def sample_diagonal(
    opt_state: PyTree,
    params: PyTree,
    key: jax.Array,
    *,
    size: Any,
    weight_decay: Any,
    temperature: Any = 1.0,
) -> PyTree:
    """Parameters from the posterior that `vadam` and `vogn` follow,
    `N(params, (temperature / size) (diag(s) + weight_decay I)^{-1})`.

    `s` are the mean squares in the state, weights unbiased, as the step uses them. Before the first
    gradient nothing is known of the curvature, and the draw is the mean itself. Parameters that the
    optimizer does not see (`optax.masked`) are not drawn.

    Args:
      opt_state: any Optax state with exactly one `vadam` or `vogn` in it.
      params: the mean.
      key: a new one in every step.
      size: number of training examples.
      weight_decay: that of the optimizer, positive: temperature times the prior's precision over
        `size`.
      temperature: weight of the divergence from the prior in the objective; 1 is the posterior.

    Returns:
      A tree like `params`.

    Raises:
      ValueError: a number out of range; no such optimizer in the state, or several.

    >>> import kfac_optax as ko
    >>> tx, w = ko.vadam(weight_decay=0.1), jnp.ones(2)
    >>> _, state = tx.update(w, tx.init(w), w)
    >>> sampled = sample_diagonal(state, w, jax.random.key(0), size=1e9, weight_decay=0.1)
    >>> print(sampled.round(2))
    [1. 1.]

    Reference: Khan et al., Fast and Scalable Bayesian Deep Learning by Weight-Perturbation in Adam
      (2018).
    """
    where = "sample_diagonal"
    check_number(where, "size", size, above=0)
    check_number(where, "weight_decay", weight_decay, above=0)
    check_number(where, "temperature", temperature, at_least=0)
    posterior = the_state(opt_state, DiagonalPosterior, where)
    squares, leaves = named_leaves(posterior.squares), named_leaves(params)
    known = posterior.count > 0
    drawn = {}
    for (name, s), own in zip(squares.items(), jax.random.split(key, len(squares)), strict=True):
        spread = jnp.where(known, jnp.sqrt(temperature / size / (s + weight_decay)), 0)
        drawn[name] = leaves[name] + spread * jax.random.normal(own, s.shape, s.dtype)
    return replace_leaves(params, drawn)
