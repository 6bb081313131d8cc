"""Layers in order of execution and in buckets: the one grouping that state and plan share."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kfac_optax._tree import make_buckets
from kfac_optax._types import Block, Bucket, Layer, PyTree


class Grouping(NamedTuple):
    """Layers with their blocks, one by one and stacked.

    Estimators measure layer by layer, states are kept by bucket; both take their layers from here,
    and what goes from one to the other goes through `by_bucket` and `by_layer`.

    Attributes:
      layers: in order of execution.
      blocks: of each of them.
      buckets: the same layers, those of one kind, shape and block together.
    """

    layers: tuple[Layer, ...]
    blocks: tuple[Block, ...]
    buckets: tuple[Bucket, ...]

    def by_bucket(self, of_layers: Sequence[PyTree]) -> dict[str, PyTree]:
        """What layers have each, `[copies, ...]` in their order, on one axis for every bucket."""
        of_layer = dict(zip(self.layers, of_layers, strict=True))
        stacked = {}
        for bucket in self.buckets:
            members = [of_layer[layer] for layer in bucket.layers]
            stacked[bucket.name] = jax.tree.map(lambda *xs: jnp.concatenate(xs), *members)
        return stacked

    def by_layer(self, of_buckets: Mapping[str, PyTree]) -> tuple[PyTree, ...]:
        """The way back, `[copies, ...]` for every layer; `None` for those of other buckets."""
        found: dict[Layer, PyTree] = {}
        for bucket in self.buckets:
            if bucket.name not in of_buckets:
                continue
            whole = of_buckets[bucket.name]
            for layer, mine in bucket.slices:
                found[layer] = jax.tree.map(lambda x, mine=mine: x[mine], whole)
        return tuple(found.get(layer) for layer in self.layers)


def group_layers(layers: tuple[Layer, ...], block_of: Callable[[Layer], Block]) -> Grouping:
    """Asks for the block of every layer once, and puts equal layers together.

    >>> import kfac_optax as ko
    >>> a, b = (ko.testing.dense_layer(2, q) for q in (1, 3))
    >>> grouping = group_layers((a, b), lambda layer, block=ko.kronecker(): block)
    >>> print([bucket.name for bucket in grouping.buckets])
    ['dense_2x1', 'dense_2x3']
    """
    blocks = tuple(map(block_of, layers))
    of_layer = dict(zip(layers, blocks, strict=True))
    buckets = make_buckets(layers, of_layer.__getitem__)
    return Grouping(layers, blocks, buckets)
