"""Which weights can go: scores of the optimal brain surgeon, and how the others make up for it."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from kfac_optax._tree import wide_dtype
from kfac_optax._types import PyTree
from kfac_optax._validate import check_number
from kfac_optax.linalg import lapack
from kfac_optax.linalg.row_inverse import RowInverse, inverse_of_rows


def pruning_scores(
    params: PyTree,
    per_example_grads: PyTree,
    *,
    damping: Any,
) -> PyTree:
    """By how much the loss would rise without each weight, the others adjusted:
    `w_i^2 / (2 [F^{-1}]_ii)`.

    `F` is the empirical Fisher of the gradients, damped, a full matrix over all parameters; its
    inverse is never formed, see `inverse_of_rows`. That is the second-order model at a minimum.

    Args:
      params: of the trained model.
      per_example_grads: a tree like the parameters, with an axis in front: gradients of examples or
        of small batches.
      damping: positive.

    Returns:
      A tree like the parameters, in float32 or wider.

    Raises:
      ValueError: a damping out of range, or trees that do not match.

    >>> g = jnp.array([[1.0, 0.0], [-1.0, 0.0]])
    >>> scores = pruning_scores(jnp.array([1.0, 1.0]), g, damping=0.5)
    >>> print([round(float(x), 3) for x in scores])
    [0.75, 0.25]

    Reference: Hassibi & Stork, Second Order Derivatives for Network Pruning (1992); Frantar,
      Kurtic & Alistarh, M-FAC (2021).
    """
    weights, inverse, back = _inverse("pruning_scores", params, per_example_grads, damping)
    # w_i^2 / (2 [F^{-1}]_ii)
    return back(jnp.square(weights) / (2 * inverse.diagonal()))


def prune(
    params: PyTree,
    per_example_grads: PyTree,
    remove: PyTree,
    *,
    damping: Any,
) -> PyTree:
    """Parameters without some weights, the others moved to where the second-order model of the loss
    is least.

    One weight after the other, in tree order: `w - F^{-1} e_i w_i / [F^{-1}]_ii` makes weight `i`
    zero, and `F^{-1}` loses row and column `i`. Together that is
    `w - F^{-1} E (E^T F^{-1} E)^{-1} E^T w`, `E` the unit vectors of the weights that go, which is
    what is computed.

    Args:
      params: of the trained model.
      per_example_grads: as for `pruning_scores`.
      remove: a tree like the parameters, true where a weight goes; of Python or NumPy values, as
        shapes depend on how many do.
      damping: positive.

    Returns:
      A tree like the parameters, exactly zero where weights were removed.

    Raises:
      ValueError: a damping out of range, or trees that do not match.

    >>> g = jnp.array([[1.0, 1.0], [-1.0, -1.0]])
    >>> pruned = prune(jnp.array([1.0, 2.0]), g, jnp.array([True, False]), damping=1e-6)
    >>> print([round(float(x), 3) for x in pruned])
    [0.0, 3.0]

    Reference: Hassibi & Stork, Second Order Derivatives for Network Pruning (1992).
    """
    weights, inverse, back = _inverse("prune", params, per_example_grads, damping)
    mask = jnp.concatenate([jnp.ravel(jnp.asarray(x, bool)) for x in jax.tree.leaves(remove)])
    if mask.shape != weights.shape:
        raise ValueError(
            f"prune: remove has {mask.size} entries; expected a tree like the parameters, which "
            f"have {weights.size}."
        )
    (gone,) = jnp.nonzero(mask)
    columns = jax.vmap(inverse.column)(gone)  # [k, d]
    # multipliers of the constraints w_i = 0
    multipliers = lapack.solve(columns[:, gone], weights[gone])
    moved = weights - jnp.matmul(multipliers, columns, precision=jax.lax.Precision.HIGHEST)
    # zero exactly, not up to rounding
    kept = back(moved.at[gone].set(0))
    return jax.tree.map(lambda x, p: x.astype(p.dtype), kept, params)


def _inverse(
    where: str,
    params: PyTree,
    examples: PyTree,
    damping: Any,
) -> tuple[jax.Array, RowInverse, Any]:
    """Weights as a vector, the inverse, and the way back to a tree."""
    check_number(where, "damping", damping, above=0)
    dtype = wide_dtype(params)
    weights, back = ravel_pytree(jax.tree.map(lambda x: x.astype(dtype), params))
    shapes = [x.shape for x in jax.tree.leaves(params)]
    got = [x.shape for x in jax.tree.leaves(examples)]
    same = jax.tree.structure(params) == jax.tree.structure(examples)
    if not same or [shape[1:] for shape in got] != shapes or len({s[:1] for s in got}) != 1:
        raise ValueError(
            f"{where}: per_example_grads has the shapes {got}; expected a tree like the parameters, "
            f"{shapes}, with one axis of examples in front of every leaf."
        )
    # [N, d], a row for every example
    leaves = [x.reshape(len(x), -1).astype(dtype) for x in jax.tree.leaves(examples)]
    return weights, inverse_of_rows(jnp.concatenate(leaves, axis=1), damping), back
