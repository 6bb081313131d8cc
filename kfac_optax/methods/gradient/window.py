"""The last gradients as rows of a matrix, and the Gram matrix of these rows."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import PyTree


class Window(NamedTuple):
    """A ring of `m` rows; row number `i` is in place `i % m`, places not used yet are zero."""

    rows: Float[Array, "m d"]
    gram: Float[Array, "m m"]
    count: jax.Array  # shape=(), dtype=int32: rows so far, kept below 2 m


def empty_window(size: int, params: PyTree, dtype: Any) -> Window:
    """A window for gradients of these parameters, as one vector each."""
    d = sum(x.size for x in jax.tree.leaves(params))
    return Window(
        rows=jnp.zeros((size, d), dtype),
        gram=jnp.zeros((size, size), dtype),
        count=jnp.zeros((), jnp.int32),
    )


def check_length(where: str, window: Window, vector: jax.Array) -> None:
    """Raises where a gradient is longer or shorter than the rows.

    Raises:
      ValueError: names both lengths.
    """
    got, expected = vector.shape[-1], window.rows.shape[1]
    if got != expected:
        raise ValueError(
            f"{where}.update: the gradient has {got} entries, but the state keeps rows of "
            f"{expected}. Pass a gradient of the parameters that `init` got."
        )


def put(
    window: Window,
    new: Float[Array, "k d"],
    good: jax.Array,
) -> tuple[Window, jax.Array]:
    """The window with new rows in place of the oldest, and whether they are in it.

    They are left out where `good` does not hold, or where a product with a row is not finite: one
    row whose square overflows would spoil all steps until it leaves the window.

    >>> window = empty_window(2, jnp.zeros(2), jnp.float32)
    >>> for row in ([3.0, 0.0], [0.0, 1.0], [1.0, 1.0]):
    ...     window, _ = put(window, jnp.array([row]), jnp.bool_(True))
    >>> print(window.rows[0], window.gram[0])
    [1. 1.] [2. 1.]
    """
    size = len(window.rows)
    places = (window.count + jnp.arange(len(new))) % size
    changed, good = put_at(window, new, places, good)
    count = window.count + len(new)
    count = jnp.where(count >= 2 * size, count - size, count)  # never overflows
    count = jnp.where(good, count, window.count)
    return changed._replace(count=count), good


def put_at(
    window: Window,
    new: Float[Array, "k d"],
    places: jax.Array,
    good: jax.Array,
) -> tuple[Window, jax.Array]:
    """The same in places of one's choice; the count stays."""
    # sums of all products have to be finite too
    limit = jnp.finfo(window.rows.dtype).max / (4 * len(window.rows))
    with jax.default_matmul_precision("highest"):
        products = window.rows @ new.T  # [m, k]
        products = products.at[places].set(new @ new.T)
    good = good & jnp.all(jnp.abs(products) < limit)
    # only the rows that change are selected, so that the matrix is written in place
    kept = jnp.where(good, new, window.rows[places])
    rows = window.rows.at[places].set(kept)
    # both the columns and the rows of what is new
    gram = window.gram.at[:, places].set(products)
    gram = gram.at[places].set(products.T)
    gram = jnp.where(good, gram, window.gram)
    return Window(rows, gram, window.count), good


def ages(window: Window) -> tuple[jax.Array, jax.Array]:
    """How many rows came after each, `[m]`, and which places are used."""
    size = len(window.rows)
    places = jnp.arange(size)
    later = (window.count - 1 - places) % size
    return later, places < window.count


def combine(window: Window, weights: Float[Array, " m"]) -> Float[Array, " d"]:
    """`sum_j weights_j row_j`."""
    return jnp.matmul(weights, window.rows, precision=jax.lax.Precision.HIGHEST)


def check_stacked(where: str, gradient: PyTree, examples: PyTree) -> None:
    """Checks that a tree is like the gradient, with one axis of examples in front.

    Raises:
      ValueError: names the shapes.
    """
    like = jax.tree.structure(gradient)
    got = jax.tree.structure(examples)
    shapes = [tuple(x.shape) for x in jax.tree.leaves(examples)]
    expected = [tuple(x.shape) for x in jax.tree.leaves(gradient)]
    counts = {shape[:1] for shape in shapes}
    behind = [shape[1:] for shape in shapes]
    one_axis = len(counts) == 1 and () not in counts
    if like != got or behind != expected or not one_axis:
        raise ValueError(
            f"{where}.update: per_example_grads has the shapes {shapes}; expected a tree like the "
            f"gradient, {expected}, with one axis of examples in front of every leaf, as "
            "jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(params, x, y) gives it."
        )


def stacked_rows(
    where: str,
    gradient: PyTree,
    examples: PyTree,
    dtype: Any,
) -> Float[Array, "b d"]:
    """Gradients of examples, a tree with an axis in front, as rows.

    Raises:
      ValueError: the trees do not match.
    """
    check_stacked(where, gradient, examples)
    # [b, ...] of every leaf, one beside another
    rows = [x.reshape(len(x), -1).astype(dtype) for x in jax.tree.leaves(examples)]
    return jnp.concatenate(rows, axis=1)
