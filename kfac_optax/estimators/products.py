"""Exact curvature products and quadratic forms, from one linearisation of the model; the matrix is
never formed.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfac_optax._tree import inner
from kfac_optax._types import PyTree
from kfac_optax.estimators.centring import about_mean, is_centred
from kfac_optax.estimators.heads import Kind, count_examples, find_weights, split_outputs
from kfac_optax.estimators.reductions import devices_of, sum_over_devices
from kfac_optax.estimators.tangents import linearized
from kfac_optax.linalg.gram import replicated
from kfac_optax.linalg.pairs import symmetric_matrix

_CHUNK = 8  # directions that exist at the same time


class _Linear(NamedTuple):
    """The model linearised at its parameters."""

    jvp: Callable[[PyTree], Any]  # direction to tangents of the naturals
    hessian: Callable[[Any], Any]  # tangents to the output Hessian's product with them, weighted
    examples: int


def _linearize(
    kind: Kind,
    function: Callable,
    params: PyTree,
    args: Sequence[PyTree],
    axis_name: Any = None,
) -> _Linear:
    def naturals(params: PyTree) -> tuple[Any, Any]:
        return split_outputs(kind, function(params, *args))

    # tangents of the natural arrays, J_b d
    jvp, heads = linearized(naturals, params)
    examples = count_examples(kind, heads)
    # the Hessian in the losses is the identity: sum_b g_b g_b^T
    if kind.losses:
        return _Linear(jvp, lambda tangents: tangents, examples)
    roots = find_weights(kind, heads, axis_name).roots

    def tangents_of(direction: PyTree) -> Any:
        pairs = zip(jvp(direction), roots, strict=True)
        return [read_terms(tangent, root) for tangent, root in pairs]

    def hessian(tangents: Any) -> Any:
        # H_b J_b d of every term, then times the weight of the term
        products = []
        for head, tangent, root in zip(heads, tangents, roots, strict=True):
            # one centring is enough: `C^T W C = W C` for `C = I - 1 w^T / N`
            if is_centred(head):
                tangent = about_mean(tangent, root, axis_name)
            product = head.hessian_product(tangent)
            products.append(_weighted(product, root))
        return products

    return _Linear(tangents_of, hessian, examples)


def vector_product(
    kind: Kind,
    function: Callable,
    params: PyTree,
    vector: PyTree,
    args: Sequence[PyTree],
    axis_name: Any = None,
) -> PyTree:
    """`(1/N) sum_b J_b^T H_b J_b v`, a tree like `params`; a mean over devices too where
    `axis_name` is given.
    """
    # J^T H J v: forward, output Hessian, transpose of the forward map
    model = _linearize(kind, function, params, args, axis_name)
    tangents = model.jvp(vector)
    pull = jax.linear_transpose(model.jvp, params)
    (product,) = pull(model.hessian(tangents))
    product = sum_over_devices(product, axis_name, tangents)
    examples = model.examples * devices_of(axis_name)
    return jax.tree.map(lambda x: x / examples, product)


def quadratic_form(
    kind: Kind,
    function: Callable,
    params: PyTree,
    directions: Sequence[PyTree] | Callable[[jax.Array], PyTree],
    args: Sequence[PyTree],
    axis_name: Any = None,
    count: int | None = None,
) -> jax.Array:
    """`[m, m]` matrix `d_i^T F d_j = (1/N) sum_b (J_b d_i)^T H_b (J_b d_j)` of `m` directions, from
    one linearisation.

    Costs one forward pass and one forward-mode pass for every direction, no backward pass. Of a
    function that makes `count` directions only a few exist at a time.
    """
    model = _linearize(kind, function, params, args, axis_name)
    if callable(directions):
        if count is None:
            raise ValueError(
                "quadratic_form: directions is a function; expected count=, how many directions it "
                "makes."
            )
        form = _form_of_many(model, directions, count)
        return form if axis_name is None else jax.lax.pmean(form, axis_name)
    tangents = [model.jvp(direction) for direction in directions]
    products = [model.hessian(tangent) for tangent in tangents]

    def entry(i: int, j: int) -> jax.Array:
        return inner(tangents[i], products[j]) / model.examples

    form = symmetric_matrix(entry, len(directions))
    return form if axis_name is None else jax.lax.pmean(form, axis_name)


def _form_of_many(
    model: _Linear, direction: Callable[[jax.Array], PyTree], count: int
) -> jax.Array:
    # [steps, chunk] indices, the last ones repeated
    chunk = min(count, _CHUNK)
    steps = -(-count // chunk)
    repeated = jnp.minimum(jnp.arange(steps * chunk), count - 1)
    indices = repeated.reshape(steps, chunk)

    def one(index: jax.Array) -> tuple[Any, Any]:
        tangents = model.jvp(direction(index))
        return tangents, model.hessian(tangents)

    def products_of(x: jax.Array, y: jax.Array) -> jax.Array:
        # [steps, chunk, *tangent] twice -> [steps, chunk, steps, chunk]
        wide = jnp.promote_types(x.dtype, jnp.float32)
        axes = tuple(range(2, x.ndim))
        return jax.lax.dot_general(
            x.astype(wide),
            y.astype(wide),
            ((axes, axes), ((), ())),
            precision="highest",
            out_sharding=replicated(x, 4),
        )

    tangents, products = jax.lax.map(jax.vmap(one), indices)
    # a sum over the natural arrays of all heads
    pairs = zip(jax.tree.leaves(tangents), jax.tree.leaves(products), strict=True)
    form = jnp.zeros(())
    for x, y in pairs:
        form = form + products_of(x, y)
    square = form.reshape(steps * chunk, -1)
    return square[:count, :count] / model.examples


def _weighted(product: tuple[jax.Array, ...], root: Any) -> tuple[jax.Array, ...]:
    if root is None:
        return product
    # the Hessian of a term times its weight
    weight = jnp.square(jnp.asarray(root))

    def apply(x: jax.Array) -> jax.Array:
        return (x * _beside(weight, x)).astype(x.dtype)

    return tuple(map(apply, read_terms(product, root)))


def read_terms(values: tuple[jax.Array, ...], root: Any) -> tuple[jax.Array, ...]:
    """Values of the terms that count, zeros in place of padding, whatever that holds."""
    if root is None:
        return values

    def read(x: jax.Array) -> jax.Array:
        counts = _beside(jnp.asarray(root), x) != 0
        return jnp.where(counts, x, jnp.zeros((), x.dtype))

    return tuple(map(read, values))


def _beside(weight: jax.Array, x: jax.Array) -> jax.Array:
    missing = x.ndim - weight.ndim
    return weight.reshape(weight.shape + (1,) * missing)
