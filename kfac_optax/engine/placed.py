"""Statistics, refresh, online updates and solves of layers that are divided over devices."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfac_optax._tree import all_finite, select
from kfac_optax._types import Average, Layer, PyTree, Vector
from kfac_optax.engine import stagger
from kfac_optax.engine.division import (
    Division,
    divide,
    failures,
    kept_rows,
    made_rows,
    used_slots,
)
from kfac_optax.engine.exchange import from_groups, make_own
from kfac_optax.engine.mapped import as_varying, check_same, on_devices
from kfac_optax.engine.placement import Placement
from kfac_optax.engine.renew import absorbed, kept_finite, online, renewed
from kfac_optax.engine.scatter import scattered_means
from kfac_optax.engine.state import (
    CurvatureState,
    OwnFactors,
    Step,
    block_of_bucket,
    own_values,
)
from kfac_optax.estimators.owned import Owners


def division_of(
    placement: Placement,
    copies: Mapping[str, int],
    factors: Mapping[str, PyTree],
    inverses: Mapping[str, PyTree] | None = None,
) -> Division:
    """How matrices are divided, by the shapes of what is kept for them by bucket; `inverses` tell
    what is sent.
    """
    costs, sent = {}, {}
    for name, statistic in factors.items():
        # shapes of one copy
        shapes = [x.shape[1:] for x in jax.tree.leaves(own_values(statistic))]
        costs[name] = copies[name], stagger.cost(shapes)
        leaves = [] if inverses is None else jax.tree.leaves(inverses[name])
        sent[name] = sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in leaves)
    return divide(placement, costs, sent)


def first_placed(
    placement: Placement, factors: PyTree, inverses: PyTree
) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """Factors and inverses as a placement divides them, before anything was measured, when all
    matrices of a bucket are the same.

    Inside `shard_map` and `pmap` they are what one device keeps, elsewhere what all of them do.
    """
    copies = {name: jax.tree.leaves(statistic)[0].shape[0] for name, statistic in factors.items()}
    shares = division_of(placement, copies, factors).shares
    # mapped, each device makes its own places; else all of them at once
    devices = 1 if placement.mapped else placement.devices

    def places(tree: PyTree, count: int) -> PyTree:
        return jax.tree.map(lambda x: jnp.repeat(x[:1], devices * count, 0), tree)

    if placement.divided:
        inverses = {name: places(inverses[name], share.slots) for name, share in shares.items()}
    if placement.owned:
        factors = {
            name: OwnFactors(places(factors[name], share.most), jnp.asarray(share.count, jnp.int32))
            for name, share in shares.items()
        }
    return factors, inverses


def own_statistics(
    step: Step,
    placement: Placement,
    factors: Mapping[str, PyTree],
    measured: Mapping[str, PyTree],
) -> dict[str, PyTree]:
    """Of statistics of all matrices, `[copies, ...]` by bucket, those of what this device
    factorises, `[places, ...]`: as they are where they are local, else means over devices.
    """
    # by the shapes of what is kept: what is measured may have news beside it
    division = division_of(placement, step.copies, factors)
    joined, sent = {}, dict(measured)
    if not placement.local:
        # rows of the batch are those of all devices already
        for bucket in step.buckets:
            block = block_of_bucket(bucket)
            if block.absorb is not None and block.absorbs == "columns":
                sent[bucket.name], joined[bucket.name] = measured[bucket.name]
        sent = scattered_means(division, sent, placement.travel)
    own = {}
    for name, statistic in sent.items():
        share = division.shares[name]
        own[name] = made_rows(division, share, statistic) if placement.local else statistic
        if name in joined:
            own[name] = own[name], made_rows(division, share, joined[name])
    return own


def owners_of(
    step: Step, placement: Placement, factors: Mapping[str, PyTree]
) -> tuple[Owners, ...]:
    """Which devices factorise a matrix of each layer: with local statistics they alone measure
    it.
    """
    division = division_of(placement, step.copies, factors)
    owners: dict[Layer, Owners] = {}
    for bucket in step.buckets:
        counts = division.shares[bucket.name].count.ravel()
        # of every matrix its device, one range behind the other
        device_of = np.repeat(np.arange(len(counts)), counts)
        for layer, mine in bucket.slices:
            devices = np.zeros(len(counts), bool)
            devices[device_of[mine]] = True
            owners[layer] = Owners(placement.axis, devices)
    return tuple(owners[layer] for layer in step.layers)


def factorize_placed(
    step: Step, placement: Placement, state: CurvatureState
) -> tuple[dict[str, PyTree], jax.Array]:
    """New inverses of all buckets, every device its part, with the old one in place of each that is
    not finite, and how many factorisations have failed by now.

    In a divided state they are what each device keeps.
    """
    # undivided: every device keeps all inverses, and makes a part of them
    division = division_of(placement, step.copies, state.factors, state.inverses)
    divided = placement.divided

    def on_device(held: PyTree, whole: PyTree, factors: PyTree, damping, count, previous):
        if not placement.owned:
            check_same(placement, factors)
        # branches of a block's own have to agree about what differs between devices
        apart = as_varying(placement, (damping, count))
        made, good = {}, {}
        for bucket in step.buckets:
            block, share = block_of_bucket(bucket), division.shares[bucket.name]
            old = (held if divided else whole)[bucket.name]
            # what all devices make of the same does not differ
            now = (damping, count) if share.everywhere and not divided else apart

            def make(old, statistic, block=block, previous=previous, now=now):
                return renewed(block, old, statistic, now[0], now[1], previous)

            new = make_own(division, share, make, old, own_values(factors[bucket.name]))
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
    division = division_of(placement, step.copies, state.factors)

    def on_device(held: PyTree, factors: PyTree, news: PyTree, damping, average, finite):
        # of all matrices those that this device keeps; divided ones are those already
        def rows(name: str, tree: PyTree) -> PyTree:
            if placement.owned:
                return own_values(tree)
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
    division = division_of(placement, step.copies, factors)

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

    def __init__(self, step: Step, placement: Placement, factors: PyTree, inverses: PyTree):
        self._placement, self._inverses = placement, inverses
        self._division = division_of(placement, step.copies, factors)
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
    return AllInverses(step, step.divided, factors, inverses)
