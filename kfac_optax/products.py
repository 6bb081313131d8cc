"""Exact curvature products and quadratic forms, from one linearisation of the model; the matrix is never formed."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfac_optax._tree import inner
from kfac_optax._types import PyTree
from kfac_optax.heads import Kind, count_examples, find_weights, split_outputs


class _Linear(NamedTuple):
    """The model linearised at its parameters."""

    jvp: Callable[[PyTree], Any]  # direction to tangents of the naturals
    hessian: Callable[[Any], Any]  # tangents to the output Hessian's product with them, weighted
    examples: int


def _linearize(
    kind: Kind, function: Callable, params: PyTree, args: Sequence[PyTree], axis_name: Any = None
) -> _Linear:
    def naturals(params: PyTree) -> tuple[Any, Any]:
        return split_outputs(kind, function(params, *args))

    _, jvp, heads = jax.linearize(naturals, params, has_aux=True)
    examples = count_examples(kind, heads)
    if kind.losses:
        return _Linear(jvp, lambda tangents: tangents, examples)
    roots = find_weights(kind, heads, axis_name).roots

    def hessian(tangents: Any) -> Any:
        products = [head.hessian_product(tangent) for head, tangent in zip(heads, tangents, strict=True)]
        return [_weighted(p, root) for p, root in zip(products, roots, strict=True)]

    return _Linear(jvp, hessian, examples)


def vector_product(
    kind: Kind, function: Callable, params: PyTree, vector: PyTree, args: Sequence[PyTree], axis_name: Any = None
) -> PyTree:
    """`(1/N) sum_b J_b^T H_b J_b v`, a tree like `params`; a mean over devices too where `axis_name` is given."""
    model = _linearize(kind, function, params, args, axis_name)
    (product,) = jax.linear_transpose(model.jvp, params)(model.hessian(model.jvp(vector)))
    product = jax.tree.map(lambda x: x / model.examples, product)
    return product if axis_name is None else jax.lax.pmean(product, axis_name)


def quadratic_form(
    kind: Kind,
    function: Callable,
    params: PyTree,
    directions: Sequence[PyTree],
    args: Sequence[PyTree],
    axis_name: Any = None,
) -> jax.Array:
    """`[m, m]` matrix `d_i^T F d_j = (1/N) sum_b (J_b d_i)^T H_b (J_b d_j)` of `m` directions, from one linearisation.

    Costs one forward pass and one forward-mode pass for every direction, no backward pass.
    """
    model = _linearize(kind, function, params, args, axis_name)
    tangents = [model.jvp(direction) for direction in directions]
    products = [model.hessian(tangent) for tangent in tangents]
    m = len(directions)
    entries = {(i, j): inner(tangents[i], products[j]) / model.examples for i in range(m) for j in range(i, m)}
    form = jnp.stack([jnp.stack([entries[min(i, j), max(i, j)] for j in range(m)]) for i in range(m)])
    return form if axis_name is None else jax.lax.pmean(form, axis_name)


def _weighted(product: tuple[jax.Array, ...], root: Any) -> tuple[jax.Array, ...]:
    if root is None:
        return product
    weight = jnp.square(jnp.asarray(root))
    return tuple((x * weight.reshape(weight.shape + (1,) * (x.ndim - weight.ndim))).astype(x.dtype) for x in product)
