"""The Laplace approximation: the posterior that a trained model's curvature stands for."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._tree import covered_leaves, wide_dtype
from kfac_optax._types import Block, PyTree
from kfac_optax._validate import check_number
from kfac_optax.bayes.measure import (
    Batches,
    Measured,
    check_means,
    factorize,
    mean_statistics,
)
from kfac_optax.bayes.posterior import Posterior
from kfac_optax.engine.block_inverse import covered_with
from kfac_optax.engine.choice import BlockOf
from kfac_optax.engine.grouping import Grouping, group_layers
from kfac_optax.engine.state import start_of_bucket
from kfac_optax.estimators.estimator import Estimator


def laplace(
    estimator: Estimator,
    params: PyTree,
    batches: Batches,
    *,
    prior_precision: Any = 1.0,
    size: Any = None,
    block: Block | BlockOf | None = None,
    normalization: str = "unitwise",
    uncovered: str = "raise",
    key: jax.Array | None = None,
) -> Posterior:
    """Gaussian posterior `N(params, (N F + prior_precision I)^{-1})` over a trained model's
    parameters.

    `F` is the block-diagonal curvature of the mean negative log-likelihood at the parameters, a
    mean over all `N` examples. The parameters should minimise
    `loss + prior_precision / (2 N) |params|^2`: training with weight decay `c` added to the
    gradient of the mean loss means `prior_precision = c N`.

    Args:
      estimator: `ggn(predict)`, or `fisher(predict)` with a key; with `empirical_fisher` there are
        no predictions.
      params: of the trained model.
      batches: the training data, an iterable of tuples of the further arguments of `predict`, such
        as `[(x1,), (x2,)]`. `ekfac_block` goes through it twice.
      prior_precision: of the prior `N(0, I / prior_precision)`.
      size: number of training examples `N`; default those of all batches, which may be a part.
      block: as for `scale_by_curvature`; default `kronecker()`, damped
        exactly.
      normalization: as for `kfac`; `"pass"` fixes scales and shifts.
      uncovered: parameters without a block: `"raise"`, `"pass"` (they are fixed at their value) or
        `"diagonal"`.
      key: of labels that are drawn.

    Returns:
      A `Posterior`: `.sample`, `.outputs`, `.predict`, `.log_evidence`,
      `.with_best_prior_precision`, `.inverse_product`.

    Raises:
      ValueError: no batch, a number out of range, a parameter without a block, a block whose
        statistics are no mean over the data; a batch that is not finite.

    >>> import kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> posterior = laplace(estimator, jnp.ones((2, 1)), [(jnp.eye(2),)], prior_precision=3.0)
    >>> print(posterior.outputs(2 * jnp.eye(2)).covariance.ravel())
    [1. 1.]

    Reference: Ritter, Botev & Barber, A Scalable Laplace Approximation for Neural Networks (2018);
      Daxberger et al., Laplace Redux (2021).
    """
    where = "laplace"
    check_number(where, "prior_precision", prior_precision, above=0)
    if not estimator.spec.kind.gradients:
        raise ValueError(
            f"{where}: {estimator.spec.kind.name} measures inputs of layers only, so it is no "
            "model of the loss; expected ggn(predict) or fisher(predict)."
        )
    # the first batch shows the layers; it is measured with the others
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise ValueError(f"{where}: got no batch; expected an iterable of tuples such as [(x,)].")
    found = estimator.layers(params, *first)
    # one batched operation for every bucket of equal layers
    layers, block_of = covered_with(where, found, block, normalization, uncovered, exact=True)
    grouping = group_layers(layers.layers, block_of)
    check_means(where, grouping.buckets)
    dtype = wide_dtype(covered_leaves(params, layers))
    precision = jnp.asarray(prior_precision, dtype)
    data: Batches = itertools.chain([first], iterator)
    measured = _measured(estimator, params, data, grouping, key, dtype)
    if size is not None:
        # a subset of the data may stand for all of it
        check_number(where, "size", size, above=0)
        measured = measured._replace(size=jnp.asarray(size, dtype))
    # N F + prior I = N (F + prior / N I)
    inverses = factorize(grouping.buckets, measured, precision / measured.size)
    return Posterior(params, measured, inverses, precision, grouping.buckets, estimator.spec)


def _measured(
    estimator: Estimator,
    params: PyTree,
    data: Batches,
    grouping: Grouping,
    key: jax.Array | None,
    dtype: Any,
) -> Measured:
    """Statistics of the data; where a block measures in its inverse, in a second pass."""
    # a generator can be read once only
    buckets = grouping.buckets
    reads = any(block.reads_inverse for block in grouping.blocks)
    data = tuple(data) if reads else data
    measure = functools.partial(mean_statistics, estimator, params, data, grouping, key, dtype)
    if not reads:
        return measure({})
    one = jnp.ones((), dtype)
    # first pass: factors, whose eigenbasis the second pass measures in
    start = {bucket.name: start_of_bucket(bucket, dtype) for bucket in buckets}
    nothing = Measured(start, {}, one)
    measured = measure(factorize(buckets, nothing, one))
    return measure(factorize(buckets, measured._replace(moments={}), one))
