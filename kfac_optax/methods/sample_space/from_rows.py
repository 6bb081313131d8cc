"""The kernel `(1/N) J J^T` from the rows of layers, without products with `J`."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfac_optax._reasons import NOT_USED
from kfac_optax._tree import present
from kfac_optax._types import Layer, Layers
from kfac_optax.linalg.factorize import symmetrize
from kfac_optax.linalg.gram import as_replicated
from kfac_optax.linalg.row_kernel import channel_kernel, row_kernel, token_kernel
from kfac_optax.methods.sample_space.space import Leaves, Space, of_all_devices


def rows_of_gradient(
    where: str,
    curvature: Any,
    layers: Layers,
    leaves: Leaves,
    sampled: bool,
    axis_name: Any,
) -> dict[Layer, Any]:
    """Rows of all layers that the gradient has.

    Raises:
      ValueError: a part of the gradient belongs to no layer.
    """
    mine = present(layers, leaves)
    known: set[str] = set()
    for layer in mine:
        known.update(layer.leaves)
    # what the model does not use has columns of zeros in J
    known |= {u.path for u in layers.uncovered if u.reason == NOT_USED}
    if left := [name for name in leaves if name not in known]:
        raise ValueError(
            f"{where}: layers= makes the kernel of the rows of layers, but {', '.join(left)} "
            "belongs to none; expected layers for every parameter. Leave `layers` out: the kernel "
            "is then made by products with J, which are right for every model."
        )
    return curvature.rows(mine, sampled=sampled, axis_name=axis_name)


def kernel_of_rows(
    rows: dict[Layer, Any],
    space: Space,
    dtype: Any,
    axis_name: Any,
) -> jax.Array:
    """`(1/N) J J^T` of all devices, its rows in the order of the space."""
    # J J^T = sum over layers of J_l J_l^T
    parts = []
    for layer, (a, g) in rows.items():
        # tokens stay integers
        a = a if layer.kind == "embedding" else a.astype(dtype)
        parts.append(
            _part(layer, _together(a, 1, axis_name), _together(g.astype(dtype), 2, axis_name))
        )
    # from (device, b, k) of all layers to the order of the space
    order = _order(space)
    kernel = sum(parts[1:], parts[0])[order][:, order]
    return symmetrize(kernel) / space.examples


def _part(layer: Layer, a: jax.Array, g: jax.Array) -> jax.Array:
    if layer.kind == "embedding":
        # <e_s, e_t> is one for the same token, else zero
        return token_kernel(a, g)
    if layer.kind == "scale_shift":
        return channel_kernel(a, g, scale_and_shift=layer.bias is not None)
    # positions t of an example are added up: D_bk = sum_t a_bt g_kbt^T
    return row_kernel(a, g)


def _together(x: jax.Array, axis: int, axis_name: Any) -> jax.Array:
    """The examples of all devices on one axis."""
    # [..., N, ...] to [..., devices N, ...]
    mine = jnp.moveaxis(as_replicated(x), axis, 0)
    return jnp.moveaxis(of_all_devices(mine, axis_name), 0, axis)


def _order(space: Space) -> np.ndarray:
    """Where the rows of the space are among those of the kernel, `(b, k)` with all heads in `k`.

    In the space a device comes after the other, and on each a head after the other.
    """
    examples = space.heads[0][0]
    # outputs of each head, for one example
    counts = [math.prod(shape[1:]) for shape in space.heads]
    total = sum(counts)
    devices = space.size // (examples * total)
    # numbers of rows as the kernel has them, [devices, N, outputs of all heads]
    numbers = np.arange(space.size).reshape(devices, examples, total)
    of_heads = np.split(numbers, np.cumsum(counts)[:-1], axis=2)
    # heads one after another, as `flat` joins them
    return np.concatenate([x.reshape(devices, -1) for x in of_heads], 1).ravel()
