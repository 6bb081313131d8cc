"""SKFAC: K-FAC of one batch, inverted in the space of its rows."""

import functools
from collections.abc import Callable
from typing import Any

import optax

from kfac_optax._types import Block, Layer, Layers, ScalarOrSchedule
from kfac_optax._validate import check_choice, check_number
from kfac_optax.blocks.kronecker.kronecker import SHARING, kronecker
from kfac_optax.blocks.sample_space.skfac import skfac_block
from kfac_optax.engine.choice import BlockOf, beside_blocks, blocks_of
from kfac_optax.methods.kfac.fixed import kfac
from kfac_optax.methods.record import SHORT, Method, Sizes
from kfac_optax.methods.signature import flat_signature

# Words of `kfac` that the block decides on.
_SET = ("block", "inverse", "positions", "convolution", "recurrence", "factored_gradient")
Rows = int | Callable[[Layer], int]


@flat_signature(kfac, without=_SET)
def skfac(
    layers: Layers,
    *,
    rows: Rows | None = None,
    kl_clip: ScalarOrSchedule | None = None,
    sharing: str = "expand",
    normalization: str = "unitwise",
    precision: Any = "highest",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """SKFAC: factored Tikhonov K-FAC of the last batch, at a cost linear in the widths of layers.

    `U = (A + pi sqrt(damping) I)^{-1} V (G + sqrt(damping)/pi I)^{-1}` per layer, as `kfac` with
    `inverse="cholesky"` and `decay=0`, but inverted in the space of the `n` rows of the batch, see
    `skfac_block`: `O(n^2 d + n^3)` for each factor where `kfac` takes `O(n d^2 + d^3)`. Both are
    made at every statistic.

    Dense layers and attention projections get this block, with `sharing="reduce"` convolutions too.
    All others, and with `"reduce"` layers without rows of examples, get the blocks of `kfac`.

    Args:
      layers: from `fisher.layers(params, *args)`, traced on a batch of the size that will be used.
      rows: rows that each factor keeps, of a whole batch; or a function of the layer. Default those
        of the traced batch, which is enough for estimators with one pullback (`fisher`,
        `empirical_fisher`); `ggn` has one for every column of the output. With `"reduce"` as many
        as there are examples are enough.
      kl_clip: as for `kfac`; `None`, as here, for none.
      sharing: positions that share a weight: `"expand"` (a row each) or `"reduce"` (one row for an
        example).
      normalization: scale and shift of normalisation layers: `"unitwise"`, `"diagonal"` or
        `"pass"`.
      precision: matmul precision of products.
      **options: as for `kfac`. `decay` and `inverse_every` concern the other blocks alone.

    Returns:
      A transformation, to be chained with the optimizer that takes the step, as `kfac`.

    Raises:
      ValueError: a hyperparameter out of range; at the first update, more rows than there is room
        for.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> layers = estimator.layers(jnp.zeros((64, 2)), jnp.ones((5, 64)))
    >>> state = skfac(layers).init(jnp.zeros((64, 2))).preconditioner
    >>> print(state.inverses["dense_64x2"].inputs.rows.shape)
    (1, 5, 64)

    Reference: Tang et al., SKFAC: Training Neural Networks with Faster Kronecker-Factored
      Approximate Curvature (2021).
    """
    check_choice("skfac", "sharing", sharing, SHARING)
    # a number is checked here, the result of a function by the block
    if rows is not None and not callable(rows):
        check_number("skfac", "rows", rows, at_least=1)
    return kfac(
        layers,
        block=_blocks(rows, sharing, normalization, precision),
        normalization=beside_blocks(normalization),
        kl_clip=kl_clip,
        precision=precision,
        **options,
    )


def _blocks(
    rows: Rows | None,
    sharing: str,
    normalization: str,
    precision: Any,
) -> BlockOf:
    """The block of rows where a layer has some; what `kfac` gives to others."""
    # the same factors as dense matrices, for layers without rows of their own
    plain = kronecker("cholesky", sharing=sharing, precision=precision)
    others = blocks_of(plain, normalization=normalization, precision=precision)
    made = functools.cache(functools.partial(skfac_block, sharing=sharing, precision=precision))

    def block_of(layer: Layer) -> Block:
        other = others(layer)
        # a kind of its own, or rows that are not kept
        if other is not plain or not _fits(layer, sharing):
            return other
        # room for the rows of the batch that was traced
        room = layer.rows if rows is None else rows
        return made(layer.shape, room(layer) if callable(room) else room)

    return block_of


def _fits(layer: Layer, sharing: str) -> bool:
    # positions are averaged: one row for each example
    if sharing == "reduce":
        return layer.per_example
    # a row for each position, of these kinds alone
    return layer.kind in ("dense", "einsum")


def _numbers(sizes: Sizes) -> int:
    """Twice the rows of the batch are kept by what `build` makes."""
    # the mean eigenvalue of each factor
    total, rows = 2, 2 * sizes.n
    for dimension in (sizes.p, sizes.q):
        # U [m, d], U U^T [m, m] and its shift, or the dense factor where that is smaller
        few = rows < dimension
        total += rows * dimension + rows**2 + 1 if few else dimension**2
    return total


def _twice(layer: Layer) -> int:
    # a `ggn` has a row for every column of the output, of which there are two
    return 2 * layer.rows


_SHORT = SHORT | {"rows": _twice}

RECORDS = (
    Method(
        name="skfac",
        kind="preconditioner",
        summary="K-FAC of the last batch, inverted in the space of its `rows=`",
        paper="Tang et al. (2021)",
        equation="U = (A + π√λ I)⁻¹ V (G + √λ/π I)⁻¹, by (I - Uᵀ (U Uᵀ + s I)⁻¹ U) / s",
        needs=frozenset({"gradient", "curvature"}),
        state=_numbers,
        state_text="m d + m² + 1 for each factor with m < d, m = `rows=` (here 2 n), d² otherwise, "
        "and 2",
        cost=("O(d n² + n³) at every statistic", "O(d² n)"),
        test="tests/blocks/test_skfac.py::test_it_is_factored_tikhonov_of_the_batch",
        build=lambda layers, **options: skfac(layers, **(_SHORT | options)),
        block_of=lambda layer: skfac_block(layer.shape, _twice(layer)),
    ),
)
