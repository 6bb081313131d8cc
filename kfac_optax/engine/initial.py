"""Factors, inverses and coupling before anything was measured."""

import math

import jax
import jax.numpy as jnp

from kfac_optax._types import Coupling
from kfac_optax.engine.grouping import Grouping
from kfac_optax.engine.placed import first_placed
from kfac_optax.engine.placement import Placement
from kfac_optax.engine.refresh import factorize_all
from kfac_optax.engine.state import CoarseState, Step, start_of_bucket
from kfac_optax.linalg.in_order import after


def initial(
    grouping: Grouping,
    coupling: Coupling | None,
    damping: jax.Array,
    placement: Placement | None = None,
) -> tuple:
    """Factors, held inverses and coupling before anything was measured."""
    dtype = damping.dtype
    factors = {bucket.name: start_of_bucket(bucket, dtype) for bucket in grouping.buckets}
    inverses = factorize_all(grouping.buckets, factors, damping)
    step = Step(grouping, coupling, damping, placement)
    kept = factors, inverses
    if placement is not None and (placement.divided or placement.owned):
        kept = first_placed(placement, factors, inverses)
    if coupling is None:
        return *kept, ()
    rows, index = 0, {}
    coupled = tuple(layer for layer in grouping.layers if layer.coupled)
    for layer in coupled:
        # rows of the coarse matrix in order of execution, one for each copy
        index[layer.path] = jnp.arange(rows, rows + layer.copies, dtype=jnp.int32)
        rows += layer.copies
    # p q, the number of parameters of each row
    counts = [(layer.copies, math.prod(layer.shape)) for layer in coupled]
    sizes = jnp.concatenate([jnp.full(copies, count, dtype) for copies, count in counts])
    statistic = coupling.init(coupled, dtype)
    fine = step.fine(factors, inverses, sizes)
    inverse = coupling.factorize(after(statistic, inverses), fine)
    return *kept, CoarseState(statistic, inverse, sizes, index)
