"""Of Kronecker factors that all devices have: how exactly new ones near them have to arrive."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from kfac_optax._types import Average, Layer, Near, PyTree
from kfac_optax.blocks.kronecker.kronecker import Factors
from kfac_optax.engine.state import Step
from kfac_optax.linalg.tikhonov import factor_shifts

# of the damping, in each of the two factors: together less than a quarter of it
SHARE = 1 / 12
# of the norm of an average in one step: 2 * 1.4 / 12 + 1 / 12^2 < 1 / 4
GROWTH = 1.4


def near_factors(
    step: Step, factors: Mapping[str, PyTree], average: Average
) -> tuple[Near | None, ...]:
    """The averages of every layer that has two whole Kronecker factors, with the errors that may be
    made in the next statistics; `None` for other layers.

    All devices have the averages, which are made of what was sent: nothing else has to be kept.
    """
    found: dict[Layer, Near] = {}
    for bucket in step.buckets:
        kept = factors[bucket.name]
        if not isinstance(kept, Factors) or any(x.ndim != 3 for x in kept):
            continue
        errors = jax.vmap(factor_errors, (0, 0, None))(*kept, step.damping)
        largest = norms_allowed(kept.inputs, average), norms_allowed(kept.outputs, average)
        near = Near(tuple(kept), errors, largest)
        for layer, mine in bucket.slices:
            found[layer] = jax.tree.map(lambda x, mine=mine: x[mine], near)
    return tuple(found.get(layer) for layer in step.layers)


def factor_errors(a: jax.Array, g: jax.Array, damping: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Errors of `A` and `G` in Frobenius norm that move no eigenvalue of `A (x) G + damping I` by
    more than a quarter of the damping, nor any of the two with their factored damping by more than a
    twelfth of that.

    `||A|| e_G + ||G|| e_A + e_A e_G < damping / 4` with `e_A <= damping / (12 ||G||)`,
    `e_A <= ||A|| / 12` and the same of `G`; there is room for norms that grow by two fifths each. So
    what is solved with has eigenvalues within a quarter of the right ones.
    """
    norm_a, norm_g = jnp.linalg.norm(a), jnp.linalg.norm(g)
    shift_a, shift_g = factor_shifts(a, g, damping)
    tiny = jnp.finfo(norm_a.dtype).tiny
    of_a = jnp.minimum(jnp.minimum(damping / jnp.maximum(norm_g, tiny), norm_a), shift_a)
    of_g = jnp.minimum(jnp.minimum(damping / jnp.maximum(norm_a, tiny), norm_g), shift_g)
    return SHARE * of_a, SHARE * of_g


def norms_allowed(kept: jax.Array, average: Average) -> jax.Array:
    """The norms `[copies]` of a statistic with which averages `[copies, n, n]` grow by no more than
    there is room for; none where there is no average yet, but what a state starts from.
    """
    # weight ||S|| + (1 - weight) ||X|| <= GROWTH ||S||
    weight = average.weight
    ratio = (GROWTH - weight) / jnp.maximum(1 - weight, jnp.finfo(weight.dtype).eps)
    norms = jnp.linalg.norm(kept, axis=(1, 2))
    return jnp.where(average.count > 1, ratio.astype(norms.dtype) * norms, -1)
