"""Which device keeps and factorises which matrices."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfac_optax._types import PyTree
from kfac_optax.engine import stagger
from kfac_optax.engine.placement import Placement

EIGH = 9  # operations of an eigendecomposition with vectors, for one of n^3


class Share(NamedTuple):
    """The matrices of one bucket on `W` devices, in groups of `m` neighbours that keep the same
    ones.

    Devices in their order factorise `count[d]` matrices each, one range behind the other; the
    matrices of a group are kept by all of its devices. Where they are sooner made than sent, each
    device factorises all that its group keeps.
    """

    copies: int  # of the bucket, n
    count: np.ndarray  # [groups, m], how many a device factorises for its group
    everywhere: bool = False  # whether all devices of a group factorise all of them

    @property
    def kept(self) -> np.ndarray:
        """How many matrices the devices of a group keep, `[groups]`."""
        return self.count.sum(1)

    @property
    def start(self) -> np.ndarray:
        # [groups, m] as one row of devices
        """First matrix that a device factorises, `[groups, m]`."""
        flat = self.count.ravel()
        return (np.cumsum(flat) - flat).reshape(self.count.shape)

    @property
    def first(self) -> np.ndarray:
        """First matrix that a group keeps, `[groups]`."""
        return self.start[:, 0]

    @property
    def slots(self) -> int:
        """Places for matrices on every device."""
        return int(self.kept.max())

    @property
    def made(self) -> np.ndarray:
        """How many matrices a device factorises, `[groups, m]`."""
        return (
            np.broadcast_to(self.kept[:, None], self.count.shape) if self.everywhere else self.count
        )

    @property
    def most(self) -> int:
        """The largest number that a device factorises."""
        return int(self.made.max())


class Division(NamedTuple):
    """All buckets on the devices of a placement."""

    placement: Placement
    shares: dict[str, Share]

    def table(self, of_group: np.ndarray) -> jax.Array:
        """The entry of this device in a table `[groups, ...]`."""
        me = jax.lax.axis_index(self.placement.axis)
        # neighbours are one group: devices g m to g m + m - 1
        return jnp.asarray(of_group, jnp.int32)[me // self.placement.workers]

    def own(self, of_device: np.ndarray) -> jax.Array:
        """The entry of this device in a table `[groups, m]`."""
        me = jax.lax.axis_index(self.placement.axis)
        return jnp.asarray(of_device.ravel(), jnp.int32)[me]


def divide(
    placement: Placement,
    costs: Mapping[str, tuple[int, float]],
    sent: Mapping[str, float] | None = None,
) -> Division:
    """Divides matrices over devices: evenly over groups first, bucket by bucket, so that few places
    stay empty; then by cost over the devices of each group. The order of `costs` has no say.

    Args:
      placement: says over which devices.
      costs: of every bucket the number of copies and the cost of one, `p^3 + q^3`.
      sent: of every bucket the bytes of one inverse. With them `flops_per_byte` of the placement
        decides which are made by all devices that keep them.

    >>> placement = Placement("data", mesh=jax.make_mesh((1,), ("data",)))
    >>> print(divide(placement, {"small": (6, 2.0)}).shares["small"].count)
    [[6]]
    """
    devices, workers = placement.devices, placement.workers
    # among equal costs the first one is served first, and the buckets of a state change their order
    # wherever JAX puts a dictionary together again
    in_order = {name: costs[name] for name in sorted(costs)}
    kept = _over_groups(in_order, devices // workers)
    # made by all: no part of what is balanced
    known = {} if sent is None else sent
    everywhere = {
        name: EIGH * costs[name][1] < placement.flops_per_byte * size
        for name, size in known.items()
    }
    balanced = {name: cost for name, (_, cost) in in_order.items() if not everywhere.get(name)}
    rest = {name: cost for name, (_, cost) in in_order.items() if name not in balanced}
    count = _within_groups(kept, balanced, workers) | _within_groups(kept, rest, workers)
    # by name as they came
    shares = {
        name: Share(copies, count[name], everywhere.get(name, False))
        for name, (copies, _) in costs.items()
    }
    return Division(placement, shares)


def _within_groups(
    kept: Mapping[str, np.ndarray], costs: Mapping[str, float], workers: int
) -> dict[str, np.ndarray]:
    """How many of the matrices that a group keeps each of its devices factorises, `[groups, m]` by
    bucket: by cost, all buckets together.
    """
    count = {name: np.zeros((len(kept[name]), workers), int) for name in costs}
    groups = max(map(len, count.values()), default=0)
    for group in range(groups):
        within = {name: (int(kept[name][group]), cost) for name, cost in costs.items()}
        for member, part in enumerate(stagger.divide(within, parts=workers)):
            for name, (start, end) in part.items():
                count[name][group, member] = end - start
    return count


def _over_groups(costs: Mapping[str, tuple[int, float]], groups: int) -> dict[str, np.ndarray]:
    """How many matrices of every bucket each group keeps: `n // groups`, or one more in those that
    have the least to factorise so far.
    """
    load, kept = np.zeros(groups), {}
    # the largest first, to the groups with the least work
    for name, (copies, cost) in sorted(costs.items(), key=lambda item: -item[1][1]):
        counts = np.full(groups, copies // groups)
        # one more for the first n mod groups
        counts[np.argsort(load, kind="stable")[: copies % groups]] += 1
        load += counts * cost
        kept[name] = counts
    return kept


def kept_rows(division: Division, share: Share, tree: PyTree) -> PyTree:
    """Of `[copies, ...]` what this device keeps, `[slots, ...]`; empty places repeat the last."""
    rows = division.table(share.first) + jnp.arange(share.slots)
    return jax.tree.map(lambda x: x[jnp.minimum(rows, share.copies - 1)], tree)


def made_rows(division: Division, share: Share, tree: PyTree) -> PyTree:
    """Of `[copies, ...]` what this device factorises, `[most, ...]`; empty places show others."""
    rows = division.own(share.start) + jnp.arange(share.most)
    return jax.tree.map(lambda x: x[jnp.minimum(rows, share.copies - 1)], tree)


def failures(division: Division, good: Mapping[str, jax.Array]) -> jax.Array:
    """How many matrices are not good, of `[slots]` of every bucket on every device.

    The first device of a group counts for all that keep the same ones.
    """
    placement = division.placement
    # one device of a group counts for all of it
    lead = jax.lax.axis_index(placement.axis) % placement.workers == 0
    bad = jnp.zeros((), jnp.int32)
    for name, mine in good.items():
        counted = used_slots(division, division.shares[name]) & ~mine & lead
        bad = bad + jnp.sum(counted, dtype=jnp.int32)
    return jax.lax.psum(bad, placement.axis)


def used_slots(division: Division, share: Share) -> jax.Array:
    """Which places of this device have a matrix in them, `[slots]`."""
    return jnp.arange(share.slots) < division.table(share.kept)
