"""A block's measure of one use of a layer: rows of its dense view, patches of a part of the batch at a
time.
"""

import math

import jax
import jax.numpy as jnp

from kfac_optax._types import Block, PyTree, Use
from kfac_optax.capture.geometry import Conv, Geometry, ScaleShift, rows_shape, thinning, to_rows
from kfac_optax.capture.positions import reduced
from kfac_optax.linalg.batch_parts import count_parts, sum_of_parts

# Patches of a whole batch may be many times its size: above this many bytes they are formed for a
# part at a time.
PATCH_BYTES = 1 << 27


def measure_rows(
    block: Block,
    a: jax.Array,
    g: jax.Array | None,
    use: Use,
    inverse: PyTree = None,
) -> PyTree:
    """The block's measure of one matrix, with what is held for it where the block reads that."""
    if block.reads_inverse:
        return block.measure(a, g, use, inverse)
    return block.measure(a, g, use)


def measure_use(
    geometry: Geometry,
    block: Block,
    a: jax.Array,
    g: jax.Array | None,
    use: Use,
    inverse: PyTree = None,
) -> PyTree:
    """Statistic of one use, `[groups, ...]`; a convolution's patches are formed for a part of the
    batch at a time.
    """
    if block.raw:
        # maps of a convolution as they are; the axis of groups is put back
        one = jax.tree.map(lambda x: x[0], inverse)  # such layers have no groups
        statistic = measure_rows(block, a, g, use, one)
        return jax.tree.map(lambda x: x[None], statistic)
    if isinstance(geometry, ScaleShift):
        a, g = to_rows(geometry, a, g)
        return over_groups(block, a, g, use, inverse)
    # one row for every example before the block sees any
    if block.sharing == "reduce":
        a, g, weights = reduced(geometry, a, g, use.weights)
        return over_groups(block, a, g, use._replace(weights=weights), inverse)

    # every position a row; patches of a large batch in parts
    def expanded(a: jax.Array, g: jax.Array | None, weights: jax.Array | None) -> PyTree:
        return _expanded(geometry, block, a, g, use._replace(weights=weights), inverse)

    return sum_of_parts(expanded, _parts(geometry, a, block), a, g, use.weights)


def _expanded(
    geometry: Geometry,
    block: Block,
    a: jax.Array,
    g: jax.Array | None,
    use: Use,
    inverse: PyTree,
) -> PyTree:
    """Every position is a row; of many, some are left out and the others count more."""
    # of many positions every `step`-th along each axis
    _, *positions = rows_shape(geometry, a.shape, _output_shape(geometry, a))
    step = thinning(positions, block.positions)
    a, g = to_rows(geometry, a, g, step)
    if step is not None:
        # each that is left counts for those left out: a by its weight, g by the root of it
        left = [-(-n // k) for n, k in zip(positions, step, strict=True)]
        share = math.prod(positions) / math.prod(left)
        weights = use.weights
        if weights is None:
            weights = jnp.ones((a.shape[1], *positions), use.dtype)
        kept = (slice(None), *(slice(None, None, k) for k in step))
        use = use._replace(weights=share * weights[kept])
        if g is not None:
            scale = share if block.first_moments else math.sqrt(share)
            g = scale * g
    return over_groups(block, a, g, use, inverse)


def over_groups(
    block: Block,
    a: jax.Array,
    g: jax.Array | None,
    use: Use,
    inverse: PyTree = None,
) -> PyTree:
    """The block's measure for rows `[groups, ...]`, or those of all copies, and inverses likewise."""
    # no batching of a single one: LAPACK and matmuls of one matrix stay what they are
    if a.shape[0] == 1:
        a, g, inverse = jax.tree.map(lambda x: x[0], (a, g, inverse))
        statistic = measure_rows(block, a, g, use, inverse)
        return jax.tree.map(lambda x: x[None], statistic)

    def of_group(
        a: jax.Array,
        g: jax.Array | None,
        inverse: PyTree,
    ) -> PyTree:
        return measure_rows(block, a, g, use, inverse)

    return jax.vmap(of_group)(a, g, inverse)


def _output_shape(geometry: Geometry, a: jax.Array) -> tuple[int, ...]:
    if isinstance(geometry, Conv):
        # [*rows, *spatial, C] -> [*rows, *out, q], of which q is not looked at
        spatial = len(geometry.window.size)
        rows = a.shape[: -1 - spatial]
        return (*rows, *geometry.window.outputs(a.shape), 0)
    return a.shape


def _parts(geometry: Geometry, a: jax.Array, block: Block) -> int:
    """In how many parts the batch is unfolded: a divisor of it."""
    if not isinstance(geometry, Conv):
        return 1
    # only maps of examples can be taken a part at a time
    spatial = len(geometry.window.size)
    if a.ndim != spatial + 2:
        return 1
    # patches of one example times bytes of one patch
    positions = math.prod(geometry.window.outputs(a.shape))
    if block.positions is not None:
        positions = min(positions, block.positions)
    offsets, channels = math.prod(geometry.window.size), a.shape[-1]
    patch = offsets * channels * a.dtype.itemsize
    needed = math.ceil(a.shape[0] * positions * patch / PATCH_BYTES)
    return count_parts(a, needed)
