"""Kronecker block whose factors are cut into small blocks on their diagonals."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Block, Layer, Use
from kfac_optax._validate import check_choice, check_number
from kfac_optax.blocks.kronecker.kronecker import SHARING
from kfac_optax.blocks.use_rows import input_rows, share_of_layer
from kfac_optax.linalg.factorize import at_least_rounding, psd_inverse
from kfac_optax.linalg.groups import group_gram, group_identity, group_product
from kfac_optax.linalg.in_order import after


class SplitFactors(NamedTuple):
    """Blocks on the diagonals of both factors, or of their inverses."""

    inputs: Float[Array, "m s s"]
    outputs: Float[Array, "k s s"]


def split_kronecker(
    size: int = 128,
    *,
    sharing: str = "expand",
    positions: int | None = None,
    balanced: bool = False,
    precision: jax.lax.PrecisionLike = "highest",
) -> Block:
    """Kronecker block `F ~ A (x) G` with `A` and `G` zero outside of blocks on their diagonals.

    Inputs and outputs are cut into groups of `size` neighbours, the last one smaller, and only
    moments within a group are measured: `A_k = (1/N) sum_rows a_k a_k^T`. The damping is shared out
    equally, `(A + sqrt(damping) I)^{-1} V (G + sqrt(damping) I)^{-1}`, that of the last refresh.
    A factor takes `O(d size)` of memory and `O(d size^2)` to invert.

    Args:
      size: coordinates in a group, at most.
      sharing: as in `kronecker`.
      positions: as in `kronecker`.
      balanced: the number `T` of positions is shared out between both factors, `A / sqrt(T)` and
        `sqrt(T) G`: the inverse is that of the mean `A / T`, `(A / T + sqrt(damping / T) I)^{-1}`,
        and `(G + sqrt(damping / T) I)^{-1}`, each divided by `sqrt(T)`, THOR's normaliser of
        convolutions. Otherwise `A` has all of it. The product of both factors is the same.
      precision: matmul precision of factor products and solves.

    Returns:
      A `Block`.

    Raises:
      ValueError: `size < 1`, `positions < 1`, unknown `sharing`.

    >>> block = split_kronecker(1)
    >>> factors = SplitFactors(jnp.array([[[1.0]], [[3.0]]]), jnp.ones((1, 1, 1)))
    >>> inverse = block.factorize(factors, jnp.float32(1.0))
    >>> [f"{u:.3f}" for u in block.solve(inverse, jnp.ones((2, 1)), jnp.float32(1.0)).ravel()]
    ['0.250', '0.125']

    Reference: Chen et al., THOR, Trace-based Hardware-driven Layer-Oriented Natural Gradient
      Descent Computation (2021).
    """
    check_number("split_kronecker", "size", size, at_least=1)
    check_choice("split_kronecker", "sharing", sharing, SHARING)
    if positions is not None:
        check_number("split_kronecker", "positions", positions, at_least=1)

    def init(layer: Layer, dtype: jnp.dtype) -> SplitFactors:
        p, q = layer.shape
        inputs = group_identity(p, size, dtype)
        return SplitFactors(inputs, group_identity(q, size, dtype))

    def measure(a: Array, g: Array | None, use: Use) -> SplitFactors:
        # A_k = (1/N) sum_rows w a_k a_k^T for every group, [m, s, s]
        a = input_rows(a, use)
        root = math.sqrt(use.rows / use.examples) if balanced else 1.0
        inputs = group_gram(a, size, use.weights, precision=precision) / (root * use.examples)
        if g is None:  # forward only: G := I, shared out over the uses, which are added up
            identity = group_identity(use.outputs, size, use.dtype)
            return SplitFactors(inputs, root * share_of_layer(a, use) * identity)
        # the root of the weight is inside g
        total = group_gram(g.astype(use.dtype), size, precision=precision)
        return SplitFactors(inputs, root * total / use.rows)

    def factorize(factors: SplitFactors, damping: Array) -> SplitFactors:
        def inverses(blocks: Array) -> Array:
            # not below rounding, so that a group of zeros has an inverse without damping too
            groups, width, _ = blocks.shape
            mean = jnp.einsum("mii->", blocks) / (groups * width)
            shift = at_least_rounding(jnp.sqrt(damping), mean)
            return jax.vmap(psd_inverse, (0, None))(blocks, shift)

        inputs = inverses(factors.inputs)
        return SplitFactors(inputs, inverses(after(factors.outputs, inputs)))

    def between(factors: SplitFactors, v: Array) -> Array:
        # blocks are symmetric: rows of V times those of the outputs, columns times the inputs'
        right = group_product(v, factors.outputs, precision=precision)
        return group_product(right.T, factors.inputs, precision=precision).T

    def solve(inverse: SplitFactors, v: Array, damping: Array) -> Array:
        return between(inverse, v)

    name = f"split kronecker ({size})"
    return Block(
        name if sharing == "expand" else f"split kronecker ({size}, {sharing})",
        init,
        measure,
        factorize,
        solve,
        between,
        sharing=sharing,
        positions=positions,
    )
