"""What runs on which devices of a placement, and what differs between them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kfac_optax._layout import varying_axes, varying_over
from kfac_optax._types import PyTree
from kfac_optax.engine.placement import Placement

# what runs on one device: `(held, *whole) -> (held, whole)`
OnDevice = Callable[..., tuple[PyTree, PyTree]]


def on_devices(placement: Placement, function: OnDevice, held: PyTree, *whole: PyTree) -> Any:
    """Runs `function(held, *whole) -> (held, whole)` on every device of a placement.

    Args:
      placement: says where.
      function: sees what a device holds, and what all devices have; what it returns as whole has to
        be the same on all of them.
      held: arrays divided over the axis.
      *whole: arrays that all devices have.

    Returns:
      Both results, the first divided as `held` is.
    """
    if placement.mapped:
        return function(held, *whole)
    # what is divided has devices on axis 0, the rest is the same everywhere
    divided, same = P(placement.axis), P()
    mapped = jax.shard_map(
        function,
        mesh=placement.mesh,
        in_specs=(divided, *[same] * len(whole)),
        out_specs=(divided, same),
        axis_names=set(placement.names),
        # what blocks compute is not always written for it
        check_vma=False,
    )
    return mapped(held, *whole)


def tracked(placement: Placement) -> bool:
    """Whether `shard_map` keeps track of what differs between devices."""
    # the index of a device is what differs first
    return bool(varying_axes(jax.typeof(jax.lax.axis_index(placement.axis))))


def as_varying(placement: Placement, tree: PyTree) -> PyTree:
    """A tree typed as different on every device, where that is tracked."""
    return varying_over(tree, placement.names) if tracked(placement) else tree


def check_same(placement: Placement, tree: PyTree) -> None:
    """Checks that statistics are those of all devices, as far as it is tracked.

    Raises:
      ValueError: they differ between the devices that are to share the work on them.
    """
    for x in jax.tree.leaves(tree):
        differs = [name for name in varying_axes(jax.typeof(x)) if name in placement.names]
        if differs:
            raise ValueError(
                f"Placement: the statistics differ between the devices of axis {differs[0]!r}; "
                "expected the same on all of them. Pass axis_name=, the axis over which the batch "
                "is split."
            )


def on_all(placement: Placement, flags: jax.Array) -> jax.Array:
    """Whether each of `flags [k]` holds on all devices."""
    # a product of zeros and ones: few bytes, and the same everywhere where that is tracked
    return jax.lax.pmin(flags.astype(jnp.int32), placement.axis) == 1
