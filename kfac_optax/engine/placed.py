"""Refresh, online updates and solves of layers that are divided over devices."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._tree import all_finite, select
from kfac_optax._types import Average, Block, PyTree, Vector
from kfac_optax.engine import stagger
from kfac_optax.engine.division import (
    Division,
    divide,
    failures,
    from_groups,
    kept_rows,
    make_own,
    used_slots,
)
from kfac_optax.engine.placement import Placement, as_varying, check_same, on_devices
from kfac_optax.engine.state import Step, block_of_bucket
from kfac_optax.linalg.factorize import after

# `(block, old, statistic, damping, count, previous) -> new` of several matrices
Renew = Callable[[Block, PyTree, PyTree, jax.Array, jax.Array, PyTree], PyTree]


def division_of(placement: Placement, factors: Mapping[str, PyTree]) -> Division:
    """How matrices whose factors are `[copies, ...]` by bucket are divided."""
    costs = {}
    for name, statistic in factors.items():
        # of one layer, without the axis of copies
        leaves = jax.tree.leaves(statistic)
        costs[name] = leaves[0].shape[0], stagger.cost([x.shape[1:] for x in leaves])
    return divide(placement, costs)


def first_inverses(placement: Placement, factors: PyTree, inverses: PyTree) -> PyTree:
    """A divided state before anything was measured, when all matrices of a bucket are the same.

    Inside `shard_map` and `pmap` it is what one device keeps, elsewhere what all of them do.
    """
    division, devices = division_of(placement, factors), placement.devices
    kept = {}
    for name, share in division.shares.items():
        # [copies, ...] -> [W slots, ...], of which every device has [slots, ...]
        n = share.slots if placement.mapped else devices * share.slots
        kept[name] = jax.tree.map(lambda x, n=n: jnp.repeat(x[:1], n, 0), inverses[name])
    return kept


def factorize_placed(
    step: Step,
    placement: Placement,
    renew: Renew,
    factors: dict[str, PyTree],
    inverses: dict[str, PyTree],
    count: jax.Array,
    previous: PyTree,
) -> tuple[dict[str, PyTree], jax.Array]:
    """New inverses of all buckets, every device its part.

    Args:
      step: with the buckets.
      placement: says which devices.
      renew: factorises matrices.
      factors: of all matrices, by bucket.
      inverses: the old ones, as the state has them.
      count: number of statistics.
      previous: what has to be computed first.

    Returns:
      In a divided state what each device keeps, with the old ones in place of what is not finite,
      and how many that are; else all of them as they are, and zero.
    """
    division, divided = division_of(placement, factors), placement.divided

    def on_device(held: PyTree, whole: PyTree, factors: PyTree, damping, count, previous):
        check_same(placement, factors)
        # branches of a block's own have to agree about what differs between devices
        damping, count = as_varying(placement, (damping, count))
        made, good = {}, {}
        for bucket in step.buckets:
            block, share = block_of_bucket(bucket), division.shares[bucket.name]
            # [slots, ...] of this device, or [copies, ...] of all
            old = (held if divided else whole)[bucket.name]

            def make(old, statistic, block=block, previous=previous):
                return renew(block, old, statistic, damping, count, previous)

            new = make_own(division, share, make, old, factors[bucket.name])
            if divided:
                good[bucket.name] = finite = jax.vmap(all_finite)(new)
                # places that nothing belongs to stay as they were
                new = select(finite & used_slots(division, share), new, old)
            previous = made[bucket.name] = new
        return (made, failures(division, good)) if divided else ((), made)

    # a divided state stays on its devices, a whole one is the same on all of them
    held, whole = (inverses, {}) if divided else ({}, inverses)
    mine, of_all = on_devices(
        placement, on_device, held, whole, factors, step.damping, count, previous
    )
    return (mine, of_all) if divided else (of_all, jnp.zeros((), jnp.int32))


def absorb_placed(
    step: Step,
    placement: Placement,
    state: Any,
    news: dict[str, PyTree],
    average: Average,
    finite: jax.Array,
) -> tuple[dict[str, PyTree], jax.Array]:
    """Divided inverses of the buckets that absorb, with the news in them, and how many failed."""
    division = division_of(placement, state.factors)

    def on_device(held: PyTree, factors: PyTree, news: PyTree, damping, average, finite):
        made, good, previous = {}, {}, ()
        for bucket in step.buckets:
            name, absorb = bucket.name, block_of_bucket(bucket).absorb
            if absorb is None or name not in news:
                continue
            share, old = division.shares[name], held[name]
            # rows that are not finite would only keep the factorisation busy
            mine = jax.tree.map(
                lambda x: jnp.where(finite, x, 0), kept_rows(division, share, news[name])
            )
            statistic = kept_rows(division, share, factors[name])
            new = jax.vmap(absorb, (0, 0, 0, None, None))(
                old, after(mine, previous), statistic, damping, average
            )
            good[name] = jax.vmap(all_finite)(new)
            made[name] = previous = select(good[name] & finite, new, old)
        return made, failures(division, good)

    held = {name: state.inverses[name] for name in news}
    return on_devices(
        placement, on_device, held, state.factors, news, step.damping, average, finite
    )


def solve_placed(
    step: Step, placement: Placement, factors: PyTree, inverses: PyTree, vector: Vector
) -> Vector:
    """The block-diagonal preconditioner of a divided state: every device solves for what it keeps,
    then all exchange the results.
    """
    division = division_of(placement, factors)

    def on_device(held: PyTree, vector: Vector, damping: jax.Array):
        solved = []
        for bucket, v in zip(step.buckets, vector, strict=True):
            share, solve = division.shares[bucket.name], block_of_bucket(bucket).solve
            mine = kept_rows(division, share, v)
            # V [slots, p, q] here, U [copies, p, q] everywhere
            new = jax.vmap(solve, (0, 0, None))(held[bucket.name], mine, damping)
            solved.append(from_groups(division, share, new))
        return (), solved

    return on_devices(placement, on_device, inverses, vector, step.damping)[1]


class AllInverses:
    """Inverses of a divided state by bucket, `[copies, ...]`, collected from the devices when they
    are asked for.
    """

    def __init__(self, placement: Placement, factors: PyTree, inverses: PyTree):
        self._placement, self._inverses = placement, inverses
        self._division = division_of(placement, factors)
        self._known: dict[str, PyTree] = {}

    def __getitem__(self, name: str) -> PyTree:
        if name not in self._known:
            share = self._division.shares[name]

            def on_device(held: PyTree):
                return (), jax.tree.map(lambda x: from_groups(self._division, share, x), held)

            held = self._inverses[name]
            self._known[name] = on_devices(self._placement, on_device, held)[1]
        return self._known[name]


def inverses_of_all(step: Step, factors: PyTree, inverses: PyTree) -> Any:
    """Inverses by bucket, `[copies, ...]`, wherever they are kept."""
    if step.placement is None or not step.placement.divided:
        return inverses
    return AllInverses(step.placement, factors, inverses)
