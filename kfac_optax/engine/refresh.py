"""Inverses are factorised again: all at once, part by part, or on the devices that keep them."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._tree import all_finite, select
from kfac_optax._types import Bucket, PyTree
from kfac_optax.engine import stagger
from kfac_optax.engine.branches import BLOCKS, COARSE, INVERSES, when
from kfac_optax.engine.grouping import Grouping
from kfac_optax.engine.placed import factorize_placed, inverses_of_all
from kfac_optax.engine.renew import kept_finite, online, renewed
from kfac_optax.engine.state import CurvatureState, Step, block_of_bucket
from kfac_optax.linalg.in_order import after


def refresh_parts(step: Step, state: CurvatureState, due: Sequence[Any]) -> CurvatureState:
    """New inverses of the parts that are due, Python bools or traced ones; the coupling goes with
    the first part.
    """
    if len(due) == 1:
        return when(
            due[0], lambda s: refactorize_coarse(step, refactorize(step, s)), state, INVERSES
        )
    previous: PyTree = online(step.buckets, state.inverses)
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
        shapes = [x.shape for x in jax.tree.leaves(one)]
        costs[bucket.name] = bucket.copies, stagger.cost(shapes)
    return stagger.divide(costs, parts=parts)


def _refresh_part(
    step: Step, state: CurvatureState, due: Any, part: stagger.Part, previous: PyTree
) -> tuple[CurvatureState, PyTree]:
    """The state with one part refreshed where due, and what the next part has to wait for."""
    buckets = tuple(bucket for bucket in step.buckets if bucket.name in part)
    mine = step._replace(grouping=step.grouping._replace(buckets=buckets))

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
    with jax.named_scope("kfac/factorize"):
        if step.placement is not None:
            inverses, failed = factorize_placed(step, step.placement, state)
        else:
            made = factorize_all(step.buckets, state.factors, step.damping, state)
            inverses, failed = kept_finite(made, state)
    return state._replace(
        inverses=inverses, failed_inverses=failed, inverse_age=jnp.zeros((), jnp.int32)
    )


def refactorize_coarse(step: Step, state: CurvatureState) -> CurvatureState:
    """A new factorisation of the coupling, unless it is not finite."""
    if step.coupling is None:
        return state
    coarse, failed = state.coarse, state.failed_inverses
    with jax.named_scope("kfac/factorize"):
        inverses: Any = inverses_of_all(step, state.factors, state.inverses)
        fine = step.fine(state.factors, inverses, coarse.coarse_sizes)
        # all inverses are made before their failures are counted
        new = step.coupling.factorize(after(coarse.coarse_factors, failed), fine)
        good = all_finite(new)
        coarse = coarse._replace(coarse_inverse=select(good, new, coarse.coarse_inverse))
        failed = failed + (~good).astype(jnp.int32)
    return state._replace(failed_inverses=failed, coarse=coarse)


def factorize_all(
    buckets: tuple[Bucket, ...],
    factors: PyTree,
    damping: jax.Array,
    state: CurvatureState | None = None,
) -> dict[str, PyTree]:
    """What is held for every bucket, one batched factorisation after another; from scratch where
    there is no state.
    """
    inverses: dict[str, PyTree] = {}
    previous: PyTree = () if state is None else online(buckets, state.inverses)
    for bucket in buckets:
        block, statistic = block_of_bucket(bucket), factors[bucket.name]
        if state is None:
            new = jax.vmap(block.factorize, (0, None))(after(statistic, previous), damping)
        else:
            old, count = state.inverses[bucket.name], state.curvature_count
            new = renewed(block, old, statistic, damping, count, previous)
        previous = inverses[bucket.name] = new
    return inverses


def inverses_read(
    grouping: Grouping,
    inverses: Mapping[str, PyTree],
) -> tuple[PyTree, ...]:
    """What is held for every layer whose block measures in it, `[copies, ...]`; `None` for
    others.
    """
    reading = [b.name for b in grouping.buckets if block_of_bucket(b).reads_inverse]
    return grouping.by_layer({name: inverses[name] for name in reading})
