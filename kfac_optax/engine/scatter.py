"""Statistics of all devices, added up where they are factorised and nowhere else."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfac_optax._types import PyTree, Travel
from kfac_optax.blocks.kronecker.kronecker import Factors
from kfac_optax.engine.division import Division, Share
from kfac_optax.engine.mapped import as_varying
from kfac_optax.linalg.packing import pack, unpack


class _Piece(NamedTuple):
    """One array of a bucket as it is sent: a row of numbers for each matrix."""

    rows: jax.Array  # [copies, size]
    share: Share
    back: Callable[[jax.Array], jax.Array]  # `[k, size]` to what the bucket has, `[k, ...]`


def scattered_means(
    division: Division, statistics: Mapping[str, PyTree], travel: Travel
) -> dict[str, PyTree]:
    """Means over devices of the statistics that each of them factorises, from those of all matrices
    on every device, `[copies, ...]`, to `[places, ...]`; empty places are zero.

    What a device is to have lies in one row, one array behind another. So rows are about as long as
    work is even, and a reduce-scatter sends each number once, `(W - 1) / W` of the longest row for
    each device, where a sum for all sends it twice.
    """
    pieces: list[_Piece] = []
    for name, tree in statistics.items():
        pieces += [_piece(x, division.shares[name], travel, packs) for x, packs in _arrays(tree)]
    # one sum for every dtype, and of most states there is one
    found: dict[int, jax.Array] = {}
    for dtype in dict.fromkeys(piece.rows.dtype for piece in pieces):
        chosen = [i for i, piece in enumerate(pieces) if piece.rows.dtype == dtype]
        made = _scattered(division, [pieces[i] for i in chosen])
        found |= dict(zip(chosen, made, strict=True))
    # in the order in which they were taken apart
    arrays = iter([found[i] for i in range(len(pieces))])
    means = {}
    for name, tree in statistics.items():
        means[name] = jax.tree.map(lambda x: next(arrays), tree)
    return means


def _arrays(tree: PyTree) -> list[tuple[jax.Array, bool]]:
    """Arrays of a statistic, and whether each may be packed: matrices of Kronecker factors."""
    found = []
    for node in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Factors)):
        factors = isinstance(node, Factors)
        for x in jax.tree.leaves(node):
            # copies are on axis 0: as many vectors as they are long make no matrix
            found.append((x, factors and x.ndim == 3 and x.shape[1] == x.shape[2]))
    return found


def _piece(x: jax.Array, share: Share, travel: Travel, packs: bool) -> _Piece:
    """An array as it is sent, and how it is put together again."""
    sent = pack(x) if packs and travel.packed else x
    shape, dtype = sent.shape[1:], x.dtype
    rows = sent.reshape(share.copies, -1)
    if travel.dtype is not None and jnp.issubdtype(dtype, jnp.floating):
        rows = rows.astype(travel.dtype)

    def back(rows: jax.Array) -> jax.Array:
        values = rows.reshape(-1, *shape).astype(dtype)
        return unpack(values, x.shape[-1]) if sent is not x else values

    return _Piece(rows, share, back)


def _scattered(division: Division, pieces: Sequence[_Piece]) -> list[jax.Array]:
    """The means of all pieces, each `[places, ...]`, by one reduce-scatter."""
    placement = division.placement
    devices = placement.devices
    starts = [piece.share.start.ravel() for piece in pieces]
    counts = [piece.share.count.ravel() for piece in pieces]
    sizes = [piece.rows.shape[1] for piece in pieces]
    # where each piece begins in the row of a device, [pieces, W], and how long rows are
    lengths = np.array([count * size for count, size in zip(counts, sizes, strict=True)])
    offsets = np.cumsum(lengths, 0) - lengths
    longest = int(lengths.sum(0).max())
    rows = []
    for d in range(devices):
        own = [
            piece.rows[start[d] : start[d] + count[d]].ravel()
            for piece, start, count in zip(pieces, starts, counts, strict=True)
        ]
        row = jnp.concatenate(own)
        rows.append(jnp.pad(row, (0, longest - len(row))))
    # divided first, so that the sum cannot overflow
    together = as_varying(placement, jnp.stack(rows) / devices)
    mine = jax.lax.psum_scatter(together, placement.axis)
    return [_taken(division, *each, mine) for each in zip(pieces, offsets, strict=True)]


def _taken(division: Division, piece: _Piece, offsets: np.ndarray, mine: jax.Array) -> jax.Array:
    """Of the row of a device one of its pieces, `[places, ...]`."""
    share, size = piece.share, piece.rows.shape[1]
    # room for places that have nothing in them, behind the last piece
    length = share.most * size
    room = jnp.pad(mine, (0, length))
    values = jax.lax.dynamic_slice_in_dim(room, division.own(offsets), length)
    used = jnp.arange(share.most) < division.own(share.count)
    return piece.back(jnp.where(used[:, None], values.reshape(share.most, size), 0))
