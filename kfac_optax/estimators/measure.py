"""What a probe measures at one site: rows of the layer's dense view, handed to its block and to the
coupling.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._layout import whole_features
from kfac_optax._types import Block, Coupling, Layer, PyTree, Use
from kfac_optax.capture.evaluate import Measure, Zeros, as_cotangent
from kfac_optax.capture.geometry import Geometry, Rows, ScaleShift, to_rows
from kfac_optax.capture.positions import bias_rows, channel_sums, over_output
from kfac_optax.capture.row_axes import differs, rows_of_use, without_examples
from kfac_optax.capture.sites import Site
from kfac_optax.estimators.block_measure import measure_use
from kfac_optax.estimators.owned import Owners, where_owned
from kfac_optax.linalg.weighted_rows import finite_padding


def site_measure(
    site: Site,
    layer: Layer,
    block: Block,
    coupling: Coupling | None,
    use: Use,
    weights: Any,
    gradients: bool,
    at_once: bool = False,
    share: float = 1.0,
    owners: Owners | None = None,
) -> Measure:
    """The measure of one site:
    `Zeros((block statistic, coupling statistic), (rows of the block, of the coupling))`.

    Statistics have the group axis of the layer in front. Rows are kept where somebody wants to see
    all steps of a layer at once, and where the weights tell steps in time apart that a scan adds
    up: `(a, g)` for the block, what it sees (the channel sums `(alpha, gamma)` or rows) for the
    coupling.

    Args:
      site: where.
      layer: whose.
      block: its block.
      coupling: the coupling, if it sees this layer.
      use: without weights.
      weights: example or term weights, or `None`; only the shape matters here.
      gradients: whether output gradients are meaningful.
      at_once: whether the layer has several uses, which a block that needs the whole gradient of an
        example sees at once.
      share: examples of the head that the site serves, for one of the batch. `g` carries its
        inverse, which is taken out: `use` counts the examples of the head.
      owners: the devices that measure the layer; `None` for all.

    Raises:
      ValueError: the coupling or the block needs rows of examples, and there are none.
    """
    shape = site.row_shape
    if block.per_example:
        _check_examples(block, layer, shape, use.examples)
    keep = block.rows or (block.per_example and at_once)
    if coupling is not None:
        _check_rows(coupling, layer, shape, use.examples)
    # each step in time has a weight of its own, which a probe inside the scan does not see
    of_steps = weights is not None and weights.ndim > len(shape)
    late = of_steps and bool(site.loops)
    if block.sharing == "reduce":  # one row for each example and use
        use = use._replace(rows=use.examples * layer.uses)

    # a use that starts from a constant has rows of examples where the others of its layer have
    shared = not layer.per_example and without_examples(site, use.examples)
    # cotangents carry the inverse: whole for first moments, as a root for products
    scale = share if block.first_moments else math.sqrt(share)

    def measure(
        a: jax.Array,
        g: jax.Array,
        weights: jax.Array | None,
        inverse: PyTree,
    ) -> Zeros:
        a, g = whole_features(a), whole_features(g)
        # rows of all examples weigh what those do on average
        if shared and weights is not None and not late:
            weights = jnp.broadcast_to(weights.mean(), shape)
        per_row = None if weights is None or late else row_weights(weights, shape, layer.path)
        if per_row is not None:  # zero times what the padding holds need not be zero
            g = finite_padding(g, over_output(site.geometry, per_row, g.ndim))
        if shared and block.first_moments:  # such a row has the sum of the examples' gradients
            g = g / use.examples
        g = g if share == 1 else g * scale
        geometry = site.geometry
        # of an estimator that runs forward only the cotangents are zeros, which mean nothing
        g_or_none = g if gradients else None
        if differs(site, layer):
            a, g_or_none = rows_of_use(site, layer, a, g_or_none)
            geometry, g = Rows(), g_or_none
            # a use without shift is two rows for every one, see `rows_of_use`
            if isinstance(site.geometry, ScaleShift) and per_row is not None and gradients:
                per_row = jnp.stack([per_row, per_row], -1)
        statistic = rows = across = seen = None
        # kept as they are, for a measure of all uses at once; or measured here and now
        if late or keep:
            rows = jax.tree.map(as_cotangent, to_rows(geometry, a, g_or_none))
        else:
            of_use = functools.partial(_of_use, geometry, block, use)
            statistic = where_owned(owners, of_use, a, g_or_none, per_row, inverse)
        # what crosses layers: channel sums, or the rows themselves
        if coupling is not None:
            seen = (None, None)
            if gradients:
                see = channel_sums if coupling.sees == "sums" else bias_rows
                seen = see(geometry, a, g, use.bias, use.dtype)
            if not (late or coupling.late):
                across, seen = coupling.measure(*seen, per_row), None
        return Zeros((statistic, across), (rows, seen))

    return measure


def _of_use(
    geometry: Geometry,
    block: Block,
    use: Use,
    a: jax.Array,
    g: jax.Array | None,
    weights: jax.Array | None,
    inverse: PyTree,
) -> PyTree:
    """Statistic of one use with weights."""
    return measure_use(geometry, block, a, g, use._replace(weights=weights), inverse)


def _check_examples(
    block: Block,
    layer: Layer,
    shape: tuple[int, ...],
    examples: int,
) -> None:
    if not layer.per_example or not shape or shape[0] != examples:
        raise ValueError(
            f"layer {layer.path!r}: its rows are {shape}, but the batch has {examples} examples, "
            f"and block {block.name!r} needs the gradient of every example. Expected axis 0 of the "
            "layer's input to be the examples: reshape to [examples, positions, features] instead "
            "of [examples * positions, features], or give this layer another block, for example "
            "kronecker()."
        )


def _check_rows(
    coupling: Coupling,
    layer: Layer,
    shape: tuple[int, ...],
    examples: int,
) -> None:
    if not shape or shape[0] != examples:
        raise ValueError(
            f"layer {layer.path!r}: its rows are {shape}, but the batch has {examples} examples. "
            "The coarse correction needs per-example sums, so axis 0 of every layer's input has to "
            "be the examples: reshape to [examples, positions, features] instead of [examples * "
            "positions, features], or use `kfac` without it."
        )
    if coupling.sees == "rows" and len(shape) > 1:
        raise ValueError(
            f"{coupling.name}: layer {layer.path!r} has rows {shape}; expected one row per "
            f"example, ({examples},). Use the coarse correction for models with positions, or kfac "
            "without a coupling."
        )


def row_weights(
    weights: jax.Array | None,
    rows: Sequence[int],
    path: str,
) -> jax.Array | None:
    """Weights `[*batch]` of the likelihood's terms spread over a layer's rows.

    Raises:
      ValueError: the weights do not say how much each row counts.
    """
    if weights is None:
        return None
    # one weight for an example, or for each of its terms
    leading = tuple(rows[: weights.ndim])
    if weights.ndim > len(rows) or weights.shape != leading:
        raise ValueError(
            f"layer {path!r}: weights of shape {weights.shape} do not fit its rows {tuple(rows)}; "
            "expected the leading axes of the layer's input. Use one weight per example, or mask "
            "the layer's input in the model."
        )
    missing = len(rows) - weights.ndim
    beside = weights.reshape(weights.shape + (1,) * missing)
    return jnp.broadcast_to(beside, rows)
