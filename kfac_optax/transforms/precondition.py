"""Gradients to updates: every block solves for its layers, the coupling makes of that what it knows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfac_optax._tree import gather, named_leaves, replace_leaves, scatter
from kfac_optax._types import PyTree, System, Vector
from kfac_optax.transforms.state import CurvatureState, Step, block_of_bucket


def precondition(
    step: Step, state: CurvatureState, leaves: dict[str, jax.Array], dtype: Any, curvature: Any, axis_name: Any
) -> tuple[dict[str, jax.Array], jax.Array]:
    """New leaves by name, and the share of the update that the coupling changed."""

    def fine(vector: Vector) -> Vector:
        return [
            jax.vmap(block_of_bucket(b).solve, (0, 0, None))(state.held[b.name], v, step.damping)
            for b, v in zip(step.buckets, vector, strict=True)
        ]

    with jax.named_scope("kfac/precondition"):
        gradient = [gather(bucket, leaves, dtype) for bucket in step.buckets]
        share = jnp.zeros((), jnp.float32)
        if step.coupling is None:
            update = fine(gradient)
        else:
            system = _system(step, state.coarse.coarse_sizes, gradient, fine, leaves, curvature, axis_name)
            update, changed = step.coupling.apply(state.coarse.coarse_held, system)
            total = sum(jnp.sum(jnp.square(u)) for u in update)
            share = jnp.sqrt(changed / jnp.where(total > 0, total, 1))
    new: dict[str, jax.Array] = {}
    for bucket, matrices in zip(step.buckets, update, strict=True):
        new |= scatter(bucket, matrices, leaves)
    return new, share


def _system(step, sizes, gradient, fine, leaves, curvature, axis_name) -> System:
    rows, places = step.rows(), step.places()
    coupled = [i for i, bucket in enumerate(step.buckets) if bucket.layers[0].coupled]
    in_order = np.array_equal(rows, np.arange(len(rows)))

    def restrict(vector: Vector) -> jax.Array:
        restricted = jnp.concatenate([jnp.sum(vector[i], (1, 2)) for i in coupled])
        return restricted if in_order else restricted[np.argsort(rows)]

    def prolong(values: jax.Array) -> Vector:
        by_bucket = values if in_order else values[rows]
        vector, start = [jnp.zeros((), values.dtype)] * len(gradient), 0
        for i in coupled:
            vector[i] = by_bucket[start : start + len(gradient[i]), None, None]
            start += len(gradient[i])
        return [jnp.broadcast_to(x, v.shape) for x, v in zip(vector, gradient, strict=True)]

    def matrices(vector: Vector) -> list[jax.Array]:
        return [vector[i][k] for i, k in places]

    def replace(vector: Vector, matrices: Any) -> Vector:
        parts: list[list] = [[None] * len(v) for v in vector]
        for (i, k), matrix in zip(places, matrices, strict=True):
            parts[i][k] = matrix
        return [jnp.stack(parts[i]) if i in coupled else v for i, v in enumerate(vector)]

    def as_tree(vector: Vector) -> PyTree:
        """Like the parameters, zeros where no block is."""
        named: dict[str, jax.Array] = {}
        for bucket, v in zip(step.buckets, vector, strict=True):
            named |= scatter(bucket, v, leaves)
        return replace_leaves(jax.tree.map(jnp.zeros_like, curvature.params), named)

    def product(vector: Vector) -> Vector:
        _need_curvature(step, curvature)
        products = named_leaves(curvature.vector_product(as_tree(vector), axis_name=axis_name))
        return [gather(bucket, products, v.dtype) for bucket, v in zip(step.buckets, vector, strict=True)]

    def coarse() -> jax.Array:
        _need_curvature(step, curvature)

        def direction(row: jax.Array) -> PyTree:
            return as_tree(prolong((jnp.arange(len(rows)) == row).astype(sizes.dtype)))

        return curvature.quadratic_form(direction, count=len(rows), axis_name=axis_name).astype(sizes.dtype)

    return System(gradient, fine, restrict, prolong, matrices, replace, product, coarse, step.damping, sizes)


def _need_curvature(step: Step, curvature: Any) -> None:
    if curvature is None:
        assert step.coupling is not None
        raise ValueError(
            f"{step.coupling.name}: this coupling takes exact products with the curvature of the batch in every step, but "
            "got curvature=None. Pass curvature=fisher.at(params, *args, key=key) every time (statistics still follow "
            "curvature_every), or use the additive correction."
        )
