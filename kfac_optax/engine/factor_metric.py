"""The metric of a preconditioner's own approximation, for step rules that ask how long an update
is.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._tree import covered_leaves, gather, named_leaves, present
from kfac_optax._types import Block, Layers, PyTree
from kfac_optax.engine.choice import BlockOf, blocks_of, cover
from kfac_optax.engine.grouping import group_layers
from kfac_optax.engine.state import CurvatureState, OwnFactors, block_of_bucket, the_state


def factor_metric(
    layers: Layers,
    *,
    block: Block | BlockOf | None = None,
    normalization: str = "unitwise",
    uncovered: str = "pass",
) -> Callable[[PyTree, PyTree], jax.Array]:
    """The squared norm of an update in the running approximation, `sum_i <U_i, F_i U_i>`, without
    damping.

    `F_i` are the averaged statistics in the state, not the factorised ones, which may be older; a
    coupling has no part in it. It is never more than `<U, V>` of fresh factors, which counts the
    damping too, and needs no pass through the model.

    Args:
      layers: what the preconditioner was made from.
      block: as given to `scale_by_curvature`; default the Kronecker block of `kfac`. A block made
        anew with the same settings serves.
      normalization: as for `kfac`.
      uncovered: as for `kfac`.

    Returns:
      A function `(state, updates) -> scalar`; the state is any with exactly one K-FAC
      transformation in it.

    Raises:
      ValueError: the state has none or several, was made with other layers or blocks, or has its
        factors divided over devices.

    >>> import kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((2, 1)), jnp.eye(2)
    >>> layers = estimator.layers(w, x)
    >>> tx = ko.scale_by_curvature(layers, block=ko.kronecker(), damping=0.5)
    >>> updates, state = tx.update(jnp.ones((2, 1)), tx.init(w), w, curvature=estimator.at(w, x))
    >>> print(updates.ravel(), factor_metric(layers)(state, updates))
    [1. 1.] 1.0
    """
    where = "factor_metric"
    layers = cover(layers, uncovered=uncovered, normalization=normalization, where=where)
    block_of = blocks_of(block, normalization=normalization)

    def metric(state: PyTree, updates: PyTree) -> jax.Array:
        # statistics and not their inverses: F_i without damping
        factors = the_state(state, CurvatureState, where).factors
        leaves = named_leaves(updates)
        buckets = group_layers(present(layers, leaves), block_of).buckets
        if {bucket.name for bucket in buckets} != set(factors):
            raise ValueError(
                f"{where}: the state holds {', '.join(sorted(factors))}, expected "
                f"{', '.join(sorted(bucket.name for bucket in buckets))}. Pass the layers, block, "
                "normalization and uncovered that the preconditioner was made with."
            )
        # no device has all of them: a sum of its own would be another metric on each
        if any(isinstance(x, OwnFactors) for x in factors.values()):
            raise ValueError(
                f"{where}: the factors in the state are divided over devices; expected all of them "
                "here. Use statistics='averaged' in the placement, or another metric."
            )
        # at least single precision, or that of the updates
        dtype: Any = jnp.result_type(jnp.float32, *covered_leaves(updates, layers).values())
        total = jnp.zeros((), dtype)
        for bucket in buckets:
            # U [copies, p, q], and the sum of <U, F U> over copies
            u = gather(bucket, leaves, dtype)
            total += jnp.sum(
                u * jax.vmap(block_of_bucket(bucket).multiply)(factors[bucket.name], u)
            )
        return total

    return metric
