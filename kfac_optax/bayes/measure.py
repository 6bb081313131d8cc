"""Statistics of a whole data set at fixed parameters, and the inverses made of them."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfac_optax._tree import all_finite
from kfac_optax._types import Average, Bucket, PyTree
from kfac_optax.engine.grouping import Grouping
from kfac_optax.engine.refresh import inverses_read
from kfac_optax.engine.state import block_of_bucket
from kfac_optax.estimators.estimator import Estimator
from kfac_optax.estimators.heads import Kind, count_examples, split_outputs
from kfac_optax.estimators.plan import Plan
from kfac_optax.linalg.in_order import after

Batches = Iterable[Sequence[PyTree]]


class Measured(NamedTuple):
    """Means over all examples."""

    statistics: dict[str, PyTree]  # by bucket
    moments: dict[str, PyTree]  # of blocks that measure in their inverse
    size: jax.Array  # examples, or the sum of their weights


def mean_statistics(
    estimator: Estimator,
    params: PyTree,
    batches: Batches,
    grouping: Grouping,
    key: jax.Array | None,
    dtype: Any,
    inverses: dict[str, PyTree],
) -> Measured:
    """One pass over the batches, every example counting the same in whichever it is.

    `inverses` is what blocks measure in, by bucket.

    Raises:
      ValueError: a batch gives numbers that are not finite.
    """
    # layers in order of execution, as in a training step
    layers, blocks, buckets = grouping
    read = inverses_read(grouping, inverses)

    @jax.jit
    def measure(params, args, key, count, read):
        # weighted by its examples, so that batches of different size make one mean
        plan = Plan(layers, blocks, None, dtype, None, count, read)
        curvature = estimator.at(params, *args, key=key)
        per_layer, _ = curvature.statistics(plan)
        prediction = estimator.spec.function(params, *args)
        weight = _weight_of(estimator.spec.kind, prediction)
        weighted = jax.tree.map(lambda x: weight * x.astype(dtype), per_layer)
        return weighted, weight

    total, size = None, jnp.zeros((), dtype)
    for i, args in enumerate(batches):
        drawn = None if key is None else jax.random.fold_in(key, i)
        # the number of the batch changes random signs
        new, weight = measure(params, tuple(args), drawn, i, read)
        _check_finite(i, new)
        total = new if total is None else jax.tree.map(jnp.add, total, new)
        size = size + weight
    # [copies, ...] of every layer -> [copies of the bucket, ...]
    statistics, moments = {}, {}
    stacked = grouping.by_bucket(jax.tree.map(lambda x: x / size, total))
    for bucket in buckets:
        mine = stacked[bucket.name]
        if block_of_bucket(bucket).absorb is not None:
            mine, moments[bucket.name] = mine
        statistics[bucket.name] = mine
    return Measured(statistics, moments, size)


@functools.partial(jax.jit, static_argnums=0)
def factorize(
    buckets: tuple[Bucket, ...],
    measured: Measured,
    damping: jax.Array,
) -> dict[str, PyTree]:
    """What blocks make of the statistics, one batched factorisation after another."""
    inverses: dict[str, PyTree] = {}
    previous: PyTree = ()
    zero = jnp.zeros(())
    first = Average(zero, jnp.ones((), jnp.int32), zero)  # nothing was measured before
    for bucket in buckets:
        block = block_of_bucket(bucket)
        # all matrices of a bucket at once, one bucket after another
        ready = after(measured.statistics[bucket.name], previous)
        made = jax.vmap(block.factorize, (0, None))(ready, damping)
        # moments replace the product of the eigenvalues as a whole
        if bucket.name in measured.moments:
            assert block.absorb is not None
            absorb = jax.vmap(block.absorb, (0, 0, 0, None, None))
            moments = measured.moments[bucket.name]
            made = absorb(made, moments, ready, damping, first)
        previous = inverses[bucket.name] = made
    return inverses


def _weight_of(kind: Kind, prediction: PyTree) -> Any:
    """Number of examples, each counting its mean weight."""
    _, heads = split_outputs(kind, prediction)
    examples = count_examples(kind, heads)
    # mean weight of an example, over the heads that have some
    weights = [getattr(head, "weights", None) for head in heads]
    known = [jnp.mean(x) for x in weights if x is not None]
    if not known:
        return jnp.float32(examples)
    return examples * sum(known) / len(known)


def _check_finite(i: int, statistics: PyTree) -> None:
    # under tracing there is no value to look at
    good = all_finite(statistics)
    if not isinstance(good, jax.core.Tracer) and not bool(good):
        raise ValueError(
            f"laplace: batch {i} gives statistics that are not finite; expected numbers. Look for "
            "NaN or infinity in the batch or the parameters, and give padding the weight zero."
        )


def check_means(where: str, buckets: tuple[Bucket, ...]) -> None:
    """Checks that all statistics are means of second moments over examples.

    Raises:
      ValueError: a block follows the batches online, or averages gradients themselves.
    """
    for bucket in buckets:
        block = block_of_bucket(bucket)
        if block.first_moments or (block.absorb is not None and block.absorbs == "columns"):
            raise ValueError(
                f"{where}: layer {bucket.layers[0].path!r} has block {block.name!r}, whose "
                "statistics are no mean of second moments over the data; expected another one, "
                "such as kronecker(), low_rank(rank) or ekfac_block()."
            )
