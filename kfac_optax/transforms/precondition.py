"""Gradients to updates: every block solves for its layers, the coupling adds what it knows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfac_optax._tree import gather, scatter
from kfac_optax.transforms.state import CoarseState, CurvatureState, Step, block_of_bucket


def precondition(
    step: Step, state: CurvatureState, leaves: dict[str, jax.Array], dtype: Any
) -> tuple[dict[str, jax.Array], jax.Array]:
    """New leaves by name, and the coarse share of the update."""
    with jax.named_scope("kfac/precondition"):
        gradients = [gather(bucket, leaves, dtype) for bucket in step.buckets]
        updates = [
            jax.vmap(block_of_bucket(b).solve, (0, 0, None))(state.held[b.name], v, step.damping)
            for b, v in zip(step.buckets, gradients, strict=True)
        ]
        share = jnp.zeros((), jnp.float32)
        if step.coupling is not None:
            updates, share = _couple(step, state.coarse, gradients, updates)
    new: dict[str, jax.Array] = {}
    for bucket, update in zip(step.buckets, updates, strict=True):
        new |= scatter(bucket, update, leaves)
    return new, share


def _couple(step: Step, coarse: CoarseState, gradients: list, fine: list) -> tuple[list[jax.Array], jax.Array]:
    """Adds the coarse correction: the same shift on every entry of a layer."""
    coupling = step.coupling
    assert coupling is not None
    rows = step.rows()
    coupled = [i for i, bucket in enumerate(step.buckets) if bucket.layers[0].coupled]
    in_order = np.array_equal(rows, np.arange(len(rows)))
    restricted = jnp.concatenate([jnp.sum(gradients[i], (1, 2)) for i in coupled])
    restricted = restricted if in_order else restricted[np.argsort(rows)]
    correction = coupling.solve(coarse.coarse_held, restricted, step.damping, coarse.coarse_sizes)
    shift = jnp.asarray(coupling.coarse_weight, correction.dtype) * correction
    by_bucket = shift if in_order else shift[rows]
    combined, start = [jnp.asarray(coupling.fine_weight, u.dtype) * u for u in fine], 0
    for i in coupled:
        mine = by_bucket[start : start + fine[i].shape[0]]
        start += fine[i].shape[0]
        combined[i] = combined[i] + mine[:, None, None]
    total = sum(jnp.sum(jnp.square(u)) for u in combined)
    part = jnp.sum(jnp.square(shift) * coarse.coarse_sizes)
    return combined, jnp.sqrt(part / jnp.where(total > 0, total, 1))
