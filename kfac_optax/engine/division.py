"""Which device keeps and factorises which matrices, and how they reach the others."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfac_optax._types import PyTree
from kfac_optax.engine import stagger
from kfac_optax.engine.placement import Placement, as_varying, tracked


class Share(NamedTuple):
    """The matrices of one bucket on `W` devices, in groups of `m` neighbours that keep the same
    ones.

    Devices in their order factorise `count[d]` matrices each, one range behind the other; the
    matrices of a group are kept by all of its devices.
    """

    copies: int  # of the bucket, n
    count: np.ndarray  # [groups, m], how many a device factorises

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
    def most(self) -> int:
        """The largest number that a device factorises."""
        return int(self.count.max())


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


def divide(placement: Placement, costs: Mapping[str, tuple[int, float]]) -> Division:
    """Divides matrices over devices: evenly over groups first, bucket by bucket, so that few places
    stay empty; then by cost over the devices of each group. The order of `costs` has no say.

    >>> placement = Placement("data", mesh=jax.make_mesh((1,), ("data",)))
    >>> print(divide(placement, {"small": (6, 2.0)}).shares["small"].count)
    [[6]]
    """
    devices, workers = placement.devices, placement.workers
    groups = devices // workers
    # among equal costs the first one is served first, and the buckets of a state change their order
    # wherever JAX puts a dictionary together again
    in_order = {name: costs[name] for name in sorted(costs)}
    kept = _over_groups(in_order, groups)
    count = {name: np.zeros((groups, workers), int) for name in costs}
    for group in range(groups):
        # the matrices of a group, divided once more within it
        within = {name: (int(kept[name][group]), cost) for name, (_, cost) in in_order.items()}
        for member, part in enumerate(stagger.divide(within, parts=workers)):
            for name, (start, end) in part.items():
                count[name][group, member] = end - start
    # by name as they came
    shares = {name: Share(copies, count[name]) for name, (copies, _) in costs.items()}
    return Division(placement, shares)


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


def make_own(
    division: Division,
    share: Share,
    make: Callable[[PyTree, PyTree], PyTree],
    old: PyTree,
    statistic: PyTree,
) -> PyTree:
    """New inverses `[slots, ...]` of the matrices that this device keeps: every device of a group
    makes its own, then they exchange them.

    Args:
      division: of all buckets.
      share: of this bucket.
      make: `(old, statistic) -> new`, `[k, ...]` all, for any `k`.
      old: what this device keeps, `[slots, ...]`.
      statistic: of all matrices, `[copies, ...]`.
    """
    placement, most = division.placement, share.most
    # first of all matrices that it factorises, and of those that it keeps
    start, first = division.own(share.start), division.table(share.first)

    def some(count: int) -> Callable[[PyTree], PyTree]:
        def run(trees: PyTree) -> PyTree:
            old, statistic = trees
            if count == 0:
                # nothing to do: an array of the same shape
                none = jax.tree.map(lambda x: jnp.zeros((most, *x.shape[1:]), x.dtype), old)
                return as_varying(placement, none)
            # old inverses lie in places of the group, statistics in those of the bucket
            mine = _rows(old, start - first, count), _rows(statistic, start, count)
            made = jax.tree.map(lambda x: _longer(x, most), make(*mine))
            return as_varying(placement, made)

        return run

    numbers = np.unique(share.count)
    trees = as_varying(placement, (old, statistic))
    # every device runs the branch for as many matrices as it has
    branch = division.own(np.searchsorted(numbers, share.count))
    branches = [some(int(count)) for count in numbers]
    made = branches[0](trees) if len(numbers) == 1 else jax.lax.switch(branch, branches, trees)
    return jax.tree.map(functools.partial(_within_group, division, share), made)


def _within_group(division: Division, share: Share, made: jax.Array) -> jax.Array:
    """What all devices of a group have made, from `[most, ...]` on each to `[slots, ...]`."""
    placement, (groups, workers) = division.placement, share.count.shape
    if workers == 1:
        return made
    if groups == 1:
        return _to_all(placement, share.count.ravel(), made)
    members = np.arange(placement.devices).reshape(groups, workers).tolist()
    # a gather would send more empty places than a sum sends zeros
    if workers * share.most > 2 * share.slots and not tracked(placement) and made.dtype != bool:
        start = division.own(share.start) - division.table(share.first)
        summed = _apart(placement, made, share.slots, start, division.own(share.count))
        return jax.lax.psum(summed, placement.axis, axis_index_groups=members)
    # sums over groups are not to be had where it is tracked what differs
    together = jax.lax.all_gather(made, placement.axis, axis_index_groups=members)
    # slots that stay empty show the first matrix
    places = np.zeros((groups, share.slots), int)
    for group, counts in enumerate(share.count):
        places[group, : counts.sum()] = _places(counts, share.most)
    return _flat(together)[division.table(places)]


def from_groups(division: Division, share: Share, kept: jax.Array) -> jax.Array:
    """What every group has, from `[slots, ...]` to all matrices `[copies, ...]` on all devices."""
    placement, (groups, workers) = division.placement, share.count.shape
    if workers == 1:
        return _to_all(placement, share.kept, kept)
    if not tracked(placement):
        # one device of every group: none gets anything twice
        receivers = np.arange(placement.devices).reshape(groups, workers).T.tolist()
        return _to_all(placement, share.kept, kept, receivers)
    # whether several groups agree is not tracked, so that all devices have to take part
    first = np.where(np.arange(workers) == 0, share.kept[:, None], 0)
    return _to_all(placement, first.ravel(), kept)


def _to_all(
    placement: Placement, counts: np.ndarray, mine: jax.Array, receivers: Any = None
) -> jax.Array:
    """The first `counts[d]` rows of every device `d`, one after another: by a sum, of zeros for
    what others have, or by gathering rows that nobody needs, whichever sends less.

    A sum sends every row twice.
    """
    longest, total = mine.shape[0], int(counts.sum())
    options: dict[str, Any] = {} if receivers is None else {"axis_index_groups": receivers}
    # what is sent: W longest rows by a gather, twice the total by a sum
    if len(counts) * longest <= 2 * total or mine.dtype == bool:
        to = {"to": "invarying"} if tracked(placement) else {}
        together = jax.lax.all_gather(mine, placement.axis, **options, **to)
        return _flat(together)[_places(counts, longest)]
    me = jax.lax.axis_index(placement.axis)
    if receivers is not None:
        me = me // len(receivers)
    # row of the first, and number, of what this device has
    start, count = (jnp.asarray(x, jnp.int32)[me] for x in (np.cumsum(counts) - counts, counts))
    return jax.lax.psum(_apart(placement, mine, total, start, count), placement.axis, **options)


def _apart(
    placement: Placement, mine: jax.Array, total: int, start: jax.Array, count: jax.Array
) -> jax.Array:
    """The first `count` rows of a device where they belong among `total`, zeros elsewhere."""
    longest = mine.shape[0]
    used = (jnp.arange(longest) < count).reshape(-1, *[1] * (mine.ndim - 1))
    # room for the unused rows of the last device, cut off again
    zeros = jnp.zeros((total + longest, *mine.shape[1:]), mine.dtype)
    placed = jax.lax.dynamic_update_slice_in_dim(
        as_varying(placement, zeros), jnp.where(used, mine, 0), start, 0
    )
    return placed[:total]


def kept_rows(division: Division, share: Share, tree: PyTree) -> PyTree:
    """Of `[copies, ...]` what this device keeps, `[slots, ...]`; empty places repeat the last."""
    rows = division.table(share.first) + jnp.arange(share.slots)
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


def _places(counts: np.ndarray, size: int) -> np.ndarray:
    """Positions of the used rows among those of all devices, `size` on each."""
    return np.concatenate([d * size + np.arange(n) for d, n in enumerate(counts)])


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])


def _rows(tree: PyTree, start: jax.Array, count: int) -> PyTree:
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, count), tree)


def _longer(x: jax.Array, size: int) -> jax.Array:
    return jnp.pad(x, [(0, size - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
