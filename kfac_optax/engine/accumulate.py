"""Factors take in new statistics; blocks that absorb take them into their inverses at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._tree import all_finite, together
from kfac_optax._types import Average, PyTree
from kfac_optax.engine.branches import STATISTICS, when
from kfac_optax.engine.mapped import on_all
from kfac_optax.engine.placed import absorb_placed, own_statistics
from kfac_optax.engine.protocol import check_measured
from kfac_optax.engine.renew import absorbed, failed_by_now, online
from kfac_optax.engine.state import (
    CoarseState,
    CurvatureState,
    OwnFactors,
    Step,
    block_of_bucket,
    own_values,
)


def take_statistics(
    step: Step,
    state: CurvatureState,
    due: Any,
    measure: Callable[[], tuple[list, PyTree]],
    decay: Any,
) -> CurvatureState:
    """New statistics where due; of what is held, only blocks that absorb pass through the branch."""

    def view(state: CurvatureState) -> CurvatureState:
        return state._replace(inverses=online(step.buckets, state.inverses))

    new = when(due, lambda s: accumulate(step, s, measure(), decay), state, STATISTICS, view)
    return new._replace(inverses=state.inverses | new.inverses)


def accumulate(
    step: Step, state: CurvatureState, measured: tuple[list, PyTree], decay: Any
) -> CurvatureState:
    """Averages in new statistics, unless they are not finite; blocks that absorb do so."""
    per_layer, across = measured
    # of layers [copies, ...] to those of buckets
    stacked_of = step.grouping.by_bucket(per_layer)
    # of all layers: a device's own may be those that none of its examples reaches
    good, learnt = _verdict(step, (stacked_of, across))
    if step.owned is not None:
        stacked_of = own_statistics(step, step.owned, state.factors, stacked_of)
    finite = good & learnt
    count = state.curvature_count + finite.astype(jnp.int32)
    averaged = average_at(count, decay)

    def average(old: jax.Array, new: jax.Array) -> jax.Array:
        e = averaged.weight.astype(old.dtype)
        return jnp.where(finite, e * old + (1 - e) * new.astype(old.dtype), old)

    factors, news = {}, {}
    for bucket in step.buckets:
        stacked = stacked_of[bucket.name]
        if block_of_bucket(bucket).absorb is not None:
            stacked, news[bucket.name] = stacked
        old = state.factors[bucket.name]
        check_measured("scale_by_curvature.update", bucket, stacked, own_values(old))
        new = jax.tree.map(average, own_values(old), stacked)
        factors[bucket.name] = old._replace(own=new) if isinstance(old, OwnFactors) else new
    coarse = state.coarse
    if isinstance(coarse, CoarseState):
        coarse = coarse._replace(
            coarse_factors=jax.tree.map(average, coarse.coarse_factors, across)
        )
    skipped = state.skipped_statistics + (~good).astype(jnp.int32)
    state = state._replace(
        factors=factors, curvature_count=count, skipped_statistics=skipped, coarse=coarse
    )
    return _absorb(step, state, news, averaged, finite) if news else state


def average_at(count: jax.Array, decay: Any) -> Average:
    """How statistic number `count` is averaged in."""
    # statistic k enters with weight 1/k while that is more than 1 - decay: a mean at first
    k = jnp.maximum(count, 1).astype(jnp.float32)
    bound = jnp.asarray(decay, jnp.float32)
    return Average(jnp.minimum(1 - 1 / k, bound), count, bound)


def _verdict(step: Step, measured: PyTree) -> tuple[jax.Array, jax.Array]:
    """Whether all that was measured is finite, and whether there was an example.

    Where every device keeps layers of its own, all of them have to agree: what one leaves out all
    do. What is measured of local statistics has to have an example on every device, of scattered
    ones on some.
    """
    largest = _largest(measured)
    # weights that are all zero give zeros everywhere: nothing learnt about the curvature
    good, learnt = all_finite(measured), (largest > 0).any()
    if step.owned is None:
        return good, learnt
    if step.owned.local:
        good, learnt = on_all(step.owned, jnp.stack([good, learnt]))
        return good, learnt
    # sums are not seen here: what is rounded for them has to be finite as it is sent
    narrow = step.owned.travel.dtype
    if narrow is not None:
        good &= jnp.isfinite(largest.astype(narrow)).all()
    good, empty = on_all(step.owned, jnp.stack([good, ~learnt]))
    return good, ~empty


def _largest(tree: PyTree) -> jax.Array:
    """The largest size in each leaf, `[leaves]`; what it is where an entry is NaN nobody knows."""
    leaves = [x for x in jax.tree.leaves(tree) if x.size]
    dtype = jnp.result_type(jnp.float32, *leaves)
    return together([jnp.max(jnp.abs(x)).astype(dtype) for x in leaves])


def _absorb(
    step: Step, state: CurvatureState, news: dict, average: Average, finite: jax.Array
) -> CurvatureState:
    """What is held, with the news in it; layer by layer, what is not finite keeps the old one."""
    with jax.named_scope("kfac/absorb"):
        if step.divided is not None:
            made, failed = absorb_placed(step, step.divided, state, news, average, finite)
        else:
            made, good = absorbed(step, state.inverses, state.factors, news, average, finite)
            failed = failed_by_now(state, good)
    return state._replace(inverses=state.inverses | made, failed_inverses=failed)
