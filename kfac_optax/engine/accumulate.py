"""New statistics: averaged into the factors, and into what blocks follow online."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._tree import all_finite, select, together
from kfac_optax._types import Average, Bucket, Layer, PyTree
from kfac_optax.engine.branches import STATISTICS, when
from kfac_optax.engine.placed import absorb_placed
from kfac_optax.engine.protocol import check_measured
from kfac_optax.engine.state import CoarseState, CurvatureState, Step, block_of_bucket
from kfac_optax.linalg.factorize import after


def online(buckets: Sequence[Bucket], state: CurvatureState) -> dict[str, PyTree]:
    """What is held for blocks that absorb: it has changed with the statistics of this step."""
    return {
        b.name: state.inverses[b.name] for b in buckets if block_of_bucket(b).absorb is not None
    }


def inverses_read(
    layers: tuple[Layer, ...], buckets: tuple[Bucket, ...], inverses: Mapping[str, PyTree]
) -> tuple[PyTree, ...]:
    """What is held for every layer whose block measures in it, `[copies, ...]`; `None` for
    others.
    """
    found: dict[Layer, PyTree] = {}
    for bucket in buckets:
        if not block_of_bucket(bucket).reads_inverse:
            continue
        # copies of its layers are one behind the other on axis 0
        start = 0
        for layer in bucket.layers:
            mine = slice(start, start + layer.copies)
            found[layer] = jax.tree.map(lambda x, mine=mine: x[mine], inverses[bucket.name])
            start += layer.copies
    return tuple(found.get(layer) for layer in layers)


def take_statistics(
    step: Step,
    state: CurvatureState,
    due: Any,
    measure: Callable[[], tuple[list, PyTree]],
    decay: Any,
) -> CurvatureState:
    """New statistics where due; of what is held, only blocks that absorb pass through the branch."""

    def view(state: CurvatureState) -> CurvatureState:
        return state._replace(inverses=online(step.buckets, state))

    new = when(due, lambda s: accumulate(step, s, measure(), decay), state, STATISTICS, view)
    return new._replace(inverses=state.inverses | new.inverses)


def accumulate(
    step: Step, state: CurvatureState, measured: tuple[list, PyTree], decay: Any
) -> CurvatureState:
    """Averages in new statistics, unless they are not finite; blocks that absorb do so."""
    # by layer as measured, by bucket as kept
    per_layer, across = measured
    measured_of = dict(zip(step.layers, per_layer, strict=True))
    stacked_of = {b.name: _stacked(b, measured_of) for b in step.buckets}
    largest = _largest((stacked_of, across))
    good = jnp.isfinite(largest).all()
    # weights that are all zero give zeros everywhere: no example, nothing learnt about the
    # curvature
    finite = good & (largest > 0).any()
    count = state.curvature_count + finite.astype(jnp.int32)
    # e = min(1 - 1/k, decay): a plain mean of the first ones, then an exponential average
    k = jnp.maximum(count, 1).astype(jnp.float32)
    weight = jnp.minimum(1 - 1 / k, jnp.asarray(decay, jnp.float32))

    # S <- e S + (1 - e) S_new, or as it was
    def average(old: jax.Array, new: jax.Array) -> jax.Array:
        e = weight.astype(old.dtype)
        return jnp.where(finite, e * old + (1 - e) * new.astype(old.dtype), old)

    factors, news = {}, {}
    for bucket in step.buckets:
        stacked = stacked_of[bucket.name]
        # what a block absorbs comes beside its statistic, and is averaged nowhere
        if block_of_bucket(bucket).absorb is not None:
            stacked, news[bucket.name] = stacked
        check_measured("scale_by_curvature.update", bucket, stacked, state.factors[bucket.name])
        factors[bucket.name] = jax.tree.map(average, state.factors[bucket.name], stacked)
    coarse = state.coarse
    if isinstance(coarse, CoarseState):
        coarse = coarse._replace(
            coarse_factors=jax.tree.map(average, coarse.coarse_factors, across)
        )
    skipped = state.skipped_statistics + (~good).astype(jnp.int32)
    state = state._replace(
        factors=factors, curvature_count=count, skipped_statistics=skipped, coarse=coarse
    )
    averaged = Average(weight, count, jnp.asarray(decay, jnp.float32))
    return _absorb(step, state, news, averaged, finite) if news else state


def _stacked(bucket: Bucket, measured_of: dict[Layer, PyTree]) -> PyTree:
    """What the layers of a bucket measured, on one axis."""
    return jax.tree.map(
        lambda *xs: jnp.concatenate(xs), *(measured_of[layer] for layer in bucket.layers)
    )


def _largest(tree: PyTree) -> jax.Array:
    """The largest size in each leaf, `[leaves]`, NaN where one of its entries is: one pass tells
    both whether all of them are finite and whether any is not zero.
    """
    # the largest of no numbers would be an error
    leaves = [x for x in jax.tree.leaves(tree) if x.size]
    dtype = jnp.result_type(jnp.float32, *leaves)
    return together([jnp.max(jnp.abs(x)).astype(dtype) for x in leaves])


def _absorb(
    step: Step, state: CurvatureState, news: dict, average: Average, finite: jax.Array
) -> CurvatureState:
    """What is held, with the news in it; layer by layer, what is not finite keeps the old one."""
    if step.placement is not None and step.placement.divided:
        with jax.named_scope("kfac/absorb"):
            made, lost = absorb_placed(step, step.placement, state, news, average, finite)
        return state._replace(
            inverses=state.inverses | made, failed_inverses=state.failed_inverses + lost
        )
    inverses, failed, previous = dict(state.inverses), state.failed_inverses, ()
    with jax.named_scope("kfac/absorb"):
        for bucket in step.buckets:
            absorb = block_of_bucket(bucket).absorb
            if absorb is None:
                continue
            # rows that are not finite would only keep the factorisation busy
            new_ones = jax.tree.map(lambda x: jnp.where(finite, x, 0), news[bucket.name])
            old = state.inverses[bucket.name]
            new = jax.vmap(absorb, (0, 0, 0, None, None))(
                old, after(new_ones, previous), state.factors[bucket.name], step.damping, average
            )
            good = jax.vmap(all_finite)(new)
            inverses[bucket.name] = previous = select(good & finite, new, old)
            failed = failed + jnp.sum(~good, dtype=jnp.int32)
    return state._replace(inverses=inverses, failed_inverses=failed)
