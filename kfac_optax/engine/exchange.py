"""How what devices have made of their parts reaches those that need it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfac_optax._types import PyTree
from kfac_optax.engine.division import Division, Share
from kfac_optax.engine.mapped import as_varying, tracked
from kfac_optax.engine.placement import Placement


def make_own(
    division: Division,
    share: Share,
    make: Callable[[PyTree, PyTree], PyTree],
    old: PyTree,
    statistic: PyTree,
) -> PyTree:
    """New inverses `[slots, ...]` of the matrices that this device keeps: every device of a group
    makes its own, then they exchange them; or each makes all that they keep.

    Args:
      division: of all buckets.
      share: of this bucket.
      make: `(old, statistic) -> new`, `[k, ...]` all, for any `k`.
      old: what this device keeps, `[slots, ...]`.
      statistic: of all matrices, `[copies, ...]`; where factors are divided, of those that this
        device factorises, `[most, ...]`.
    """
    placement, most = division.placement, share.most
    # all devices make all: the same on all of them, and known to be
    if share.everywhere and len(share.kept) == 1:
        return make(old, statistic)
    # first of all matrices that it factorises, and of those that it keeps
    first = division.table(share.first)
    start = first if share.everywhere else division.own(share.start)

    def some(count: int) -> Callable[[PyTree], PyTree]:
        def run(trees: PyTree) -> PyTree:
            old, statistic = trees
            if count == 0:
                # nothing to do: an array of the same shape
                none = jax.tree.map(lambda x: jnp.zeros((most, *x.shape[1:]), x.dtype), old)
                return as_varying(placement, none)
            # old inverses lie in places of the group, statistics in those of the bucket or, divided,
            # in those of the device
            measured = _rows(statistic, 0 if placement.owned else start, count)
            made = make(_rows(old, start - first, count), measured)
            return as_varying(placement, jax.tree.map(lambda x: _longer(x, most), made))

        return run

    numbers = np.unique(share.made)
    trees = as_varying(placement, (old, statistic))
    # every device runs the branch for as many matrices as it has
    branch = division.own(np.searchsorted(numbers, share.made))
    branches = [some(int(count)) for count in numbers]
    made = branches[0](trees) if len(numbers) == 1 else jax.lax.switch(branch, branches, trees)
    if share.everywhere:
        return made
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


def _places(counts: np.ndarray, size: int) -> np.ndarray:
    """Positions of the used rows among those of all devices, `size` on each."""
    return np.concatenate([d * size + np.arange(n) for d, n in enumerate(counts)])


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])


def _rows(tree: PyTree, start: jax.Array | int, count: int) -> PyTree:
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, count), tree)


def _longer(x: jax.Array, size: int) -> jax.Array:
    return jnp.pad(x, [(0, size - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
