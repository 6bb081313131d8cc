"""Per-channel blocks for scale and shift of normalisation layers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Block, Layer, Use
from kfac_optax.linalg.factorize import Eigen, damped_logdet, damped_quotient, damped_root
from kfac_optax.linalg.two_by_two import small_psd_eigh
from kfac_optax.linalg.weighted_rows import keep_rows

Product = Callable[[Array, Array], Array]  # of two columns, `[C]`


def unitwise(full: bool = True) -> Block:
    """Exact Fisher block of every channel of `y = x scale + shift`, `x` the normalised input.

    `V [p, C]` with rows (scale, shift), or one row only: `p = 1 + use.bias`, and a layer with only
    a shift passes ones as `a`. With `d_b = (sum_pos g x, sum_pos g) [p]` of channel `c` in example
    `b`, positions summed inside the example, the statistic is `F_c = (1/N) sum_b d_b d_b^T`,
    `[C, p, p]`, and the solve `(F_c + damping I)^{-1} V_c` in closed form, positive definite even
    where `F_c` has rank one and the damping is tiny.

    `a` and `g` are `[N, *positions, C]`, or `[C]` for a single example. Gradients between uses of
    the same layer are left out. Weights are in `g` already; examples whose weights are all zero are
    dropped, and where `g` is zero `a` is not read. A single position of weight zero still counts if
    `g` is not zero there: it moves the loss of others.

    Without `g` (forward only) every position counts as an independent unit gradient,
    `F_c = (1/N) sum_b sum_pos w (x, 1) (x, 1)^T`.

    Args:
      full: `False` keeps the diagonals only, `[C, p]`.

    Returns:
      A `Block`.

    >>> import kfac_optax as ko
    >>> block, layer = unitwise(), ko.testing.dense_layer(1, 1, bias=True)
    >>> x, g = jnp.array([[2.0], [0.0]]), jnp.array([[1.0], [2.0]])
    >>> print(block.measure(x, g, Use(layer, 2, 2, jnp.float32)))
    [[[2.  1. ]
      [1.  2.5]]]

    Reference: Osawa et al., Large-Scale Distributed Second-Order Optimization Using
      Kronecker-Factored Approximate Curvature for Deep Convolutional Neural Networks (2019), for
      unit-wise Fisher blocks of batch normalisation.
    """

    def init(layer: Layer, dtype: jnp.dtype) -> Array:
        p, q = layer.shape
        if p > 2:
            raise ValueError(
                f"unitwise: the layer has {p} rows of parameters; expected 1 or 2 (scale, shift). "
                "Use it for normalisation layers only."
            )
        # [C, p, p], a block for every channel; or only their diagonals [C, p]
        if not full:
            return jnp.ones((q, p), dtype)
        return jnp.broadcast_to(jnp.eye(p, dtype=dtype), (q, p, p))

    def measure(a: Array, g: Array | None, use: Use) -> Array:
        a, weights = a.astype(use.dtype), use.weights
        # a single example without an axis of its own
        if a.ndim == 1:
            a, g, weights = jax.tree.map(lambda x: x[None], (a, g, weights))
        positions = tuple(range(1, a.ndim - 1))
        # forward only: x and 1 are the columns of d for unit gradients, [N, *positions, C]
        if g is None:
            return _moments(*_of_unit_gradients(a, weights, use))
        # d_b = (sum_pos g x, sum_pos g), two columns of [N, C]
        g = _drop_examples(g.astype(use.dtype), weights)
        # zero times an input that is NaN is NaN
        products = g * jnp.where(g == 0, jnp.zeros((), a.dtype), a)
        columns = [products.sum(positions)]
        if use.bias:
            columns.append(g.sum(positions))

        def product(x: Array, y: Array) -> Array:
            return jnp.sum(x * y, 0) / use.examples

        return _moments(columns, product)

    def _moments(columns: list[Array], product: Product) -> Array:
        # p diagonals [C] -> [C, p]
        if not full:
            return jnp.stack([product(x, x) for x in columns], -1)
        # p x p products [C] -> [C, p, p]
        rows = []
        for x in columns:
            row = [product(x, y) for y in columns]
            rows.append(jnp.stack(row, -1))
        return jnp.stack(rows, -2)

    def factorize(statistic: Array, damping: Array) -> Eigen | Array:
        if not full:
            return jnp.maximum(statistic, 0)
        # closed form, no LAPACK call for every channel
        return small_psd_eigh(statistic)

    def solve(inverse: Eigen | Array, v: Array, damping: Array) -> Array:
        if not isinstance(inverse, Eigen):
            return damped_quotient(v, inverse.T, damping, exact=True)
        # U^T V_c, V^T being [C, p], then U [...]: back to [p, C]
        along = jnp.sum(inverse.vectors * v.T[:, :, None], 1)
        scaled = damped_quotient(along, inverse.values, damping, exact=True)
        return _times_vectors(inverse, scaled)

    def multiply(statistic: Array, v: Array) -> Array:
        if not full:
            return statistic.T * v
        # F_c V_c for every channel
        products = jnp.sum(statistic * v.T[:, None, :], 2)
        return products.T

    def root_solve(inverse: Eigen | Array, z: Array, damping: Array) -> Array:
        if not isinstance(inverse, Eigen):
            return damped_root(z, inverse.T, damping, exact=True)
        scaled = damped_root(z.T, inverse.values, damping, exact=True)
        return _times_vectors(inverse, scaled)

    def logdet(
        inverse: Eigen | Array,
        damping: Array,
        shape: tuple[int, int],
    ) -> Array:
        values = inverse.values if isinstance(inverse, Eigen) else inverse
        return damped_logdet(values, damping, exact=True)

    return Block(
        "unit-wise" if full else "unit-wise (diagonal)",
        init,
        measure,
        factorize,
        solve,
        multiply,
        root_solve=root_solve,
        logdet=logdet,
    )


def _of_unit_gradients(
    a: Float[Array, "N *positions C"],
    weights: Float[Array, "N *positions"] | None,
    use: Use,
) -> tuple[list[Array], Product]:
    """The columns `x` and `1` of every position, and their product, a mean over examples."""
    columns = [keep_rows(a, weights)]
    if use.bias:
        columns.append(jnp.ones_like(a))
    scale = jnp.ones((), a.dtype)
    if weights is not None:
        scale = weights[..., None].astype(a.dtype)
    axes = tuple(range(a.ndim - 1))

    def product(x: Array, y: Array) -> Array:
        return jnp.sum(scale * x * y, axes) / use.examples

    return columns, product


def _times_vectors(eigen: Eigen, x: Float[Array, "C p"]) -> Float[Array, "p C"]:
    """`U_c x_c` for every channel."""
    products = jnp.sum(eigen.vectors * x[:, None, :], 2)
    return products.T


def _drop_examples(
    g: Float[Array, "N *positions C"], weights: Float[Array, "N *positions"] | None
) -> Float[Array, "N *positions C"]:
    """`g` without the examples of weight zero; a position of weight zero in another example can
    still matter there.
    """
    if weights is None:
        return g
    # [N, 1, ...]: some position of the example counts
    positions = tuple(range(1, weights.ndim))
    kept = jnp.any(weights != 0, positions, keepdims=True)
    return jnp.where(kept[..., None], g, jnp.zeros((), g.dtype))
