"""What changes between steps: factors take in new statistics, inverses are factorised again."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._tree import all_finite, make_buckets, select, together
from kfac_optax._types import Average, Block, Bucket, Coupling, Layer, PyTree
from kfac_optax.engine import stagger
from kfac_optax.engine.choice import BlockOf
from kfac_optax.engine.placed import (
    absorb_placed,
    factorize_placed,
    first_inverses,
    inverses_of_all,
)
from kfac_optax.engine.placement import Placement
from kfac_optax.engine.protocol import check_measured
from kfac_optax.engine.state import CoarseState, CurvatureState, Step, block_of_bucket
from kfac_optax.linalg.factorize import after


def initial(
    mine: tuple[Layer, ...],
    block_of: BlockOf,
    coupling: Coupling | None,
    damping: jax.Array,
    placement: Placement | None = None,
) -> tuple:
    """Factors, held inverses and coupling before anything was measured."""
    dtype, factors = damping.dtype, {}
    buckets = make_buckets(mine, block_of)
    for bucket in buckets:
        # the start of one layer, for every copy of the bucket
        one = block_of_bucket(bucket).init(bucket.layers[0], dtype)
        factors[bucket.name] = jax.tree.map(
            lambda x, n=bucket.copies: jnp.repeat(x[None], n, 0), one
        )
    inverses = _factorize(buckets, factors, damping)
    kept = inverses
    if placement is not None and placement.divided:
        kept = first_inverses(placement, factors, inverses)
    if coupling is None:
        return factors, kept, ()
    rows, index = 0, {}
    coupled = tuple(layer for layer in mine if layer.coupled)
    for layer in coupled:
        # rows of the coarse matrix in order of execution, one for each copy
        index[layer.path] = jnp.arange(rows, rows + layer.copies, dtype=jnp.int32)
        rows += layer.copies
    # p q, the number of parameters of each row
    sizes = jnp.concatenate([jnp.full(x.copies, x.shape[0] * x.shape[1], dtype) for x in coupled])
    statistic = coupling.init(coupled, dtype)
    fine = Step(mine, buckets, coupling, damping).fine(factors, inverses, sizes)
    return (
        factors,
        kept,
        CoarseState(statistic, coupling.factorize(after(statistic, inverses), fine), sizes, index),
    )


def _factorize(
    buckets: tuple[Bucket, ...],
    factors: PyTree,
    damping: jax.Array,
    state: CurvatureState | None = None,
) -> dict[str, PyTree]:
    """What is held for every bucket, one batched factorisation after another; from scratch where
    there is no state.
    """
    inverses: dict[str, PyTree] = {}
    previous: PyTree = () if state is None else _online(buckets, state)
    for bucket in buckets:
        block, statistic = block_of_bucket(bucket), factors[bucket.name]
        if state is None:
            new = jax.vmap(block.factorize, (0, None))(after(statistic, previous), damping)
        else:
            old, count = state.inverses[bucket.name], state.curvature_count
            new = _renewed(block, old, statistic, damping, count, previous)
        previous = inverses[bucket.name] = new
    return inverses


def _renewed(
    block: Block,
    old: PyTree,
    statistic: PyTree,
    damping: jax.Array,
    count: jax.Array,
    previous: PyTree,
) -> PyTree:
    """New inverses of a bucket, where its layers' own rule finds them due."""

    def renew() -> PyTree:
        ready = after(statistic, previous)
        if block.refresh is None:
            return jax.vmap(block.factorize, (0, None))(ready, damping)
        return jax.vmap(block.refresh, (0, 0, None, None))(old, ready, damping, count)

    if block.due is None:
        return renew()
    due, kept = jax.vmap(block.due, (0, 0, None, None))(old, statistic, damping, count)
    # one branch for the whole bucket: mapped over layers both of its sides would be computed
    return jax.lax.cond(jnp.any(due), lambda: select(due, renew(), kept), lambda: kept)


def _online(buckets: Sequence[Bucket], state: CurvatureState) -> dict[str, PyTree]:
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
        # copies of a layer lie side by side in its bucket
        start = 0
        for layer in bucket.layers:
            mine = slice(start, start + layer.copies)
            found[layer] = jax.tree.map(lambda x, mine=mine: x[mine], inverses[bucket.name])
            start += layer.copies
    return tuple(found.get(layer) for layer in layers)


def due_at(count: jax.Array, every: Any) -> jax.Array:
    """Whether something with this period is due at a step."""
    # hyperparameters injected by Optax are floats, periods included
    return count % jnp.asarray(every).astype(jnp.int32) == 0


def parts_due(state: CurvatureState, every: Any, parts: int) -> tuple[jax.Array, ...]:
    """Which parts of the inverses are due; all of them at first."""
    if parts == 1:
        return (due_at(state.kfac_count, every),)
    # parts that no period has reached yet still hold the inverses of the start
    every = jnp.asarray(every).astype(jnp.int32)
    first = (state.kfac_count == 0) | (state.inverse_age > state.kfac_count)
    return tuple(
        first | (state.kfac_count % every == stagger.phase(j, every, parts)) for j in range(parts)
    )


STATISTICS = (
    "factors",
    "curvature_count",
    "skipped_statistics",
    "coarse",
    "inverses",
    "failed_inverses",
)
BLOCKS = ("inverses", "failed_inverses", "inverse_age")
COARSE = ("failed_inverses", "coarse")
INVERSES = (*BLOCKS, "coarse")


def when(
    due: Any,
    change: Any,
    state: CurvatureState,
    fields: tuple[str, ...],
    view: Any = lambda state: state,
) -> CurvatureState:
    """`change(view(state))` where due; only the fields that can change pass through the branch, as
    `view` shows them.
    """
    # known while tracing: no branch is compiled
    if isinstance(due, bool):
        return change(view(state)) if due else view(state)

    def changed(_: None) -> tuple:
        new = change(view(state))
        return tuple(getattr(new, name) for name in fields)

    def same(_: None) -> tuple:
        old = view(state)
        return tuple(getattr(old, name) for name in fields)

    return state._replace(**dict(zip(fields, jax.lax.cond(due, changed, same, None), strict=True)))


def take_statistics(
    step: Step,
    state: CurvatureState,
    due: Any,
    measure: Callable[[], tuple[list, PyTree]],
    decay: Any,
) -> CurvatureState:
    """New statistics where due; of what is held, only blocks that absorb pass through the branch."""

    def view(state: CurvatureState) -> CurvatureState:
        return state._replace(inverses=_online(step.buckets, state))

    new = when(due, lambda s: accumulate(step, s, measure(), decay), state, STATISTICS, view)
    return new._replace(inverses=state.inverses | new.inverses)


def accumulate(
    step: Step, state: CurvatureState, measured: tuple[list, PyTree], decay: Any
) -> CurvatureState:
    """Averages in new statistics, unless they are not finite; blocks that absorb do so."""
    per_layer, across = measured
    measured_of = dict(zip(step.layers, per_layer, strict=True))
    stacked_of = {b.name: _stacked(b, measured_of) for b in step.buckets}
    largest = _largest((stacked_of, across))
    good = jnp.isfinite(largest).all()
    # weights that are all zero give zeros everywhere: no example, nothing learnt about the
    # curvature
    finite = good & (largest > 0).any()
    count = state.curvature_count + finite.astype(jnp.int32)
    # statistic k enters with weight 1/k while that is more than 1 - decay: a mean at first
    k = jnp.maximum(count, 1).astype(jnp.float32)
    weight = jnp.minimum(1 - 1 / k, jnp.asarray(decay, jnp.float32))

    def average(old: jax.Array, new: jax.Array) -> jax.Array:
        e = weight.astype(old.dtype)
        return jnp.where(finite, e * old + (1 - e) * new.astype(old.dtype), old)

    factors, news = {}, {}
    # of layers [copies, ...] to those of buckets
    for bucket in step.buckets:
        stacked = stacked_of[bucket.name]
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
            # a copy may fail by itself
            good = jax.vmap(all_finite)(new)
            inverses[bucket.name] = previous = select(good & finite, new, old)
            failed = failed + jnp.sum(~good, dtype=jnp.int32)
    return state._replace(inverses=inverses, failed_inverses=failed)


def refresh_parts(step: Step, state: CurvatureState, due: Sequence[Any]) -> CurvatureState:
    """New inverses of the parts that are due, Python bools or traced ones; the coupling goes with
    the first part.
    """
    if len(due) == 1:
        return when(
            due[0], lambda s: refactorize_coarse(step, refactorize(step, s)), state, INVERSES
        )
    previous: PyTree = _online(step.buckets, state)
    for one_due, part in zip(due, _divided(step, len(due)), strict=True):
        if part and one_due is not False:
            state, previous = _refresh_part(step, state, one_due, part, previous)
    if step.coupling is not None:
        state = when(due[0], lambda s: refactorize_coarse(step, s), state, COARSE)
    return state


def _divided(step: Step, parts: int) -> tuple[stagger.Part, ...]:
    costs = {}
    # the shapes of factors tell the cost, without making any
    for bucket in step.buckets:
        start = functools.partial(block_of_bucket(bucket).init, bucket.layers[0])
        one = jax.eval_shape(functools.partial(start, step.damping.dtype))
        costs[bucket.name] = bucket.copies, stagger.cost([x.shape for x in jax.tree.leaves(one)])
    return stagger.divide(costs, parts=parts)


def _refresh_part(
    step: Step, state: CurvatureState, due: Any, part: stagger.Part, previous: PyTree
) -> tuple[CurvatureState, PyTree]:
    """The state with one part refreshed where due, and what the next part has to wait for."""
    mine = step._replace(buckets=tuple(bucket for bucket in step.buckets if bucket.name in part))

    def pieces(trees: dict[str, PyTree]) -> dict[str, PyTree]:
        return {
            name: jax.tree.map(lambda x, ends=ends: x[slice(*ends)], trees[name])
            for name, ends in part.items()
        }

    def view(state: CurvatureState) -> CurvatureState:
        # cut within the branch: only what is written passes through it, and factors are not copied
        # where nothing is due
        return state._replace(
            factors=after(pieces(state.factors), previous), inverses=pieces(state.inverses)
        )

    def put(whole: jax.Array, piece: jax.Array, start: int) -> jax.Array:
        same = whole.shape == piece.shape
        return piece if same else jax.lax.dynamic_update_slice_in_dim(whole, piece, start, 0)

    new = when(due, lambda s: refactorize(mine, s), state, BLOCKS, view)
    inverses = dict(state.inverses)
    for name, (start, _) in part.items():
        inverses[name] = jax.tree.map(
            lambda x, y, start=start: put(x, y, start), inverses[name], new.inverses[name]
        )
    return new._replace(factors=state.factors, inverses=inverses), new.inverses


def refactorize(step: Step, state: CurvatureState) -> CurvatureState:
    """New inverses of all blocks; layer by layer, what is not finite keeps the old one."""
    inverses, failed = {}, state.failed_inverses
    with jax.named_scope("kfac/factorize"):
        made, lost = _made(step, state)
        failed = failed + lost if step.placement is not None else failed
        for name, new in made.items():
            if step.placement is not None and step.placement.divided:
                inverses[name] = new  # the devices that keep it have looked at it
                continue
            good = jax.vmap(all_finite)(new)
            inverses[name] = select(good, new, state.inverses[name])
            failed = failed + jnp.sum(~good, dtype=jnp.int32)
    return state._replace(
        inverses=inverses, failed_inverses=failed, inverse_age=jnp.zeros((), jnp.int32)
    )


def _made(step: Step, state: CurvatureState) -> tuple[dict[str, PyTree], Any]:
    """New inverses, and how many of them failed where the devices that keep them have found out."""
    if step.placement is None:
        return _factorize(step.buckets, state.factors, step.damping, state), 0
    return factorize_placed(
        step,
        step.placement,
        _renewed,
        state.factors,
        state.inverses,
        state.curvature_count,
        _online(step.buckets, state),
    )


def refactorize_coarse(step: Step, state: CurvatureState) -> CurvatureState:
    """A new factorisation of the coupling, unless it is not finite."""
    if step.coupling is None:
        return state
    coarse, failed = state.coarse, state.failed_inverses
    with jax.named_scope("kfac/factorize"):
        inverses: Any = inverses_of_all(step, state.factors, state.inverses)
        fine = step.fine(state.factors, inverses, coarse.coarse_sizes)
        # a divided state differs between devices, the number of failures does not
        previous = state.inverses if inverses is state.inverses else failed
        new = step.coupling.factorize(after(coarse.coarse_factors, previous), fine)
        good = all_finite(new)
        coarse = coarse._replace(coarse_inverse=select(good, new, coarse.coarse_inverse))
        failed = failed + (~good).astype(jnp.int32)
    return state._replace(failed_inverses=failed, coarse=coarse)
