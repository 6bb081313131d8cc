"""Functions of one example, mapped over a batch."""

from collections.abc import Callable, Sequence

import jax

from kfac_optax._types import PyTree


def map_examples(
    function: Callable,
    args: Sequence[PyTree],
    batch_size: int,
) -> PyTree:
    """`function(*args)` of one example after another, the results on a new axis 0.

    An example keeps its axis 0, of length one. Every array with an axis 0 as long as that of the
    first array is cut up; others are the same for all examples.

    Args:
      function: of the arguments of one example.
      args: trees of arrays.
      batch_size: how many examples at the same time.

    Raises:
      ValueError: there is no array with an axis to cut.

    >>> import jax.numpy as jnp
    >>> print(map_examples(lambda x, scale: scale * x[0], (jnp.arange(3), 2), 2))
    [0 2 4]
    """
    leaves, treedef = jax.tree.flatten(tuple(args))
    arrays = [x for x in leaves if getattr(x, "ndim", 0) > 0]
    if not arrays or not arrays[0].shape[0]:
        raise ValueError(
            "map_examples: got no array with examples on axis 0; expected the arguments of the "
            "model, such as the inputs x [N, ...]."
        )
    size = arrays[0].shape[0]

    # arrays with the examples on axis 0; others are the same for all
    def is_cut(x: PyTree) -> bool:
        return getattr(x, "ndim", 0) > 0 and x.shape[0] == size

    def of_example(rows: list[jax.Array]) -> PyTree:
        # the rows of one example in the places of the arrays they were cut from
        left = iter(rows)
        own = [next(left)[None] if is_cut(x) else x for x in leaves]
        return function(*jax.tree.unflatten(treedef, own))

    rows = [x for x in leaves if is_cut(x)]
    return jax.lax.map(of_example, rows, batch_size=min(batch_size, size))
