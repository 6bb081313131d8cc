"""One vector for every axis of a tensor: the mean over all others, and what Eva-s solves with it."""

from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax.methods.gradient.axes import Group


def zeros(group: Group, dtype: Any) -> dict[str, jax.Array]:
    """A vector for every axis of a group's tensors."""
    shapes = [(group.copies, n) for n in group.block]
    return {str(i): jnp.zeros(shape, dtype) for i, shape in enumerate(shapes)}


def averaged(
    group: Group,
    tensors: jax.Array,
    means: dict[str, jax.Array],
    held: jax.Array,
) -> dict[str, jax.Array]:
    """Averages with the means of these tensors over all axes but one in them."""
    out = {}
    # axis 0 is that of copies
    axes = range(1, tensors.ndim)
    for i in range(len(group.block)):
        others = tuple(axis for axis in axes if axis != i + 1)
        mean = jnp.mean(tensors, others)
        out[str(i)] = held * means[str(i)] + (1 - held) * mean
    return out


def against_product(
    group: Group,
    tensors: jax.Array,
    means: dict[str, jax.Array],
    damping: jax.Array,
) -> jax.Array:
    """`(c c^T + damping I)^{-1} G`, `c` the product of the means of all axes."""
    # c = v_1 (x) ... (x) v_k
    c = jnp.ones_like(tensors)
    for axis, v in means.items():
        c = c * _along_axis(group, v, int(axis))
    within = tuple(range(1, tensors.ndim))
    along_c = jnp.sum(c * tensors, within, keepdims=True)
    size = jnp.sum(jnp.square(c), within, keepdims=True)
    # (G - c <c, G> / (damping + |c|^2)) / damping
    seen = along_c * c / (damping + size)
    return (tensors - seen) / damping


def between_roots(
    group: Group,
    tensors: jax.Array,
    means: dict[str, jax.Array],
    damping: jax.Array,
) -> jax.Array:
    """`G x_1 H_1^r ... x_k H_k^r`, `H = v v^T + damping I` and `r = -1 / (2 k)`."""
    power = -1 / (2 * len(group.block))
    # one axis after another: their matrices commute, being on different axes
    for axis, v in means.items():
        size = jnp.sum(jnp.square(v), 1, keepdims=True)
        # u = v / |v|; zero where nothing has been measured
        length = jnp.sqrt(jnp.where(size > 0, size, 1))
        unit = _along_axis(group, v / length, int(axis))
        # H^r = damping^r I + [(damping + |v|^2)^r - damping^r] u u^T
        outside = damping**power
        change = (damping + size) ** power - outside
        each = change.reshape(-1, *[1] * len(group.block))
        along_unit = jnp.sum(unit * tensors, int(axis) + 1, keepdims=True)
        tensors = outside * tensors + each * unit * along_unit
    return tensors


def _along_axis(group: Group, v: jax.Array, axis: int) -> jax.Array:
    """Vectors `[copies, n]` laid along one axis of tensors, length one along the others."""
    shape = [group.copies] + [1] * len(group.block)
    shape[axis + 1] = group.block[axis]
    return v.reshape(shape)
