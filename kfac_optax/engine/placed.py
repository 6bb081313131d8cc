"""Refresh, online updates and solves of layers that are divided over devices."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._tree import all_finite, select
from kfac_optax._types import Average, PyTree, Vector
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
from kfac_optax.engine.renew import absorbed, kept_finite, online, renewed
from kfac_optax.engine.state import CurvatureState, Step, block_of_bucket


def division_of(placement: Placement, factors: Mapping[str, PyTree]) -> Division:
    """How matrices whose factors are `[copies, ...]` by bucket are divided."""
    costs = {}
    for name, statistic in factors.items():
        leaves = jax.tree.leaves(statistic)
        # shapes of one copy
        costs[name] = leaves[0].shape[0], stagger.cost([x.shape[1:] for x in leaves])
    return divide(placement, costs)


def first_inverses(placement: Placement, factors: PyTree, inverses: PyTree) -> PyTree:
    """A divided state before anything was measured, when all matrices of a bucket are the same.

    Inside `shard_map` and `pmap` it is what one device keeps, elsewhere what all of them do.
    """
    division, devices = division_of(placement, factors), placement.devices
    kept = {}
    for name, share in division.shares.items():
        # mapped, each device makes its own places; else all of them at once
        n = share.slots if placement.mapped else devices * share.slots
        kept[name] = jax.tree.map(lambda x, n=n: jnp.repeat(x[:1], n, 0), inverses[name])
    return kept


def factorize_placed(
    step: Step, placement: Placement, state: CurvatureState
) -> tuple[dict[str, PyTree], jax.Array]:
    """New inverses of all buckets, every device its part, with the old one in place of each that is
    not finite, and how many factorisations have failed by now.

    In a divided state they are what each device keeps.
    """
    # undivided: every device keeps all inverses, and makes a part of them
    division, divided = division_of(placement, state.factors), placement.divided

    def on_device(held: PyTree, whole: PyTree, factors: PyTree, damping, count, previous):
        check_same(placement, factors)
        # branches of a block's own have to agree about what differs between devices
        damping, count = as_varying(placement, (damping, count))
        made, good = {}, {}
        for bucket in step.buckets:
            block, share = block_of_bucket(bucket), division.shares[bucket.name]
            old = (held if divided else whole)[bucket.name]

            def make(old, statistic, block=block, previous=previous):
                return renewed(block, old, statistic, damping, count, previous)

            new = make_own(division, share, make, old, factors[bucket.name])
            if divided:
                # a copy may fail by itself
                good[bucket.name] = finite = jax.vmap(all_finite)(new)
                # places that nothing belongs to stay as they were
                new = select(finite & used_slots(division, share), new, old)
            previous = made[bucket.name] = new
        return (made, failures(division, good)) if divided else ((), made)

    held, whole = (state.inverses, {}) if divided else ({}, state.inverses)
    count, previous = state.curvature_count, online(step.buckets, state.inverses)
    mine, of_all = on_devices(
        placement, on_device, held, whole, state.factors, step.damping, count, previous
    )
    return (mine, state.failed_inverses + of_all) if divided else kept_finite(of_all, state)


def absorb_placed(
    step: Step,
    placement: Placement,
    state: CurvatureState,
    news: dict[str, PyTree],
    average: Average,
    finite: jax.Array,
) -> tuple[dict[str, PyTree], jax.Array]:
    """Divided inverses of the buckets that absorb, with the news in them, and how many
    factorisations have failed by now.
    """
    division = division_of(placement, state.factors)

    def on_device(held: PyTree, factors: PyTree, news: PyTree, damping, average, finite):
        # of all matrices those that this device keeps
        def rows(name: str, tree: PyTree) -> PyTree:
            return kept_rows(division, division.shares[name], tree)

        here = step._replace(damping=damping)
        made, good = absorbed(here, held, factors, news, average, finite, rows)
        return made, failures(division, good)

    held = online(step.buckets, state.inverses)
    made, lost = on_devices(
        placement, on_device, held, state.factors, news, step.damping, average, finite
    )
    return made, state.failed_inverses + lost


def solve_placed(
    step: Step, placement: Placement, factors: PyTree, inverses: PyTree, vector: Vector
) -> Vector:
    """The block-diagonal preconditioner of a divided state: every device solves for what it keeps,
    then all exchange the results.
    """
    # V [copies, p, q] on every device, of which each solves for its own
    division = division_of(placement, factors)

    def on_device(held: PyTree, vector: Vector, damping: jax.Array):
        solved = []
        for bucket, v in zip(step.buckets, vector, strict=True):
            share, solve = division.shares[bucket.name], block_of_bucket(bucket).solve
            mine = kept_rows(division, share, v)
            new = jax.vmap(solve, (0, 0, None))(held[bucket.name], mine, damping)
            # (F_b + damping I)^{-1} V of all copies, on all devices
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

            # collected once, by whoever asks first
            def on_device(held: PyTree):
                return (), jax.tree.map(lambda x: from_groups(self._division, share, x), held)

            held = self._inverses[name]
            self._known[name] = on_devices(self._placement, on_device, held)[1]
        return self._known[name]


def inverses_of_all(step: Step, factors: PyTree, inverses: PyTree) -> Any:
    """Inverses by bucket, `[copies, ...]`, wherever they are kept."""
    if step.divided is None:
        return inverses
    return AllInverses(step.divided, factors, inverses)
