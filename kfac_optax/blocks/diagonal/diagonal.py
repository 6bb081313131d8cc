"""Diagonal block over a statistic that is measured elsewhere."""

from typing import NoReturn

import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Block, Layer, Use
from kfac_optax.linalg.factorize import damped_logdet, damped_quotient, damped_root


def diagonal() -> Block:
    """Diagonal block `F ~ diag(S)` for parameters `V [1, n]` that belong to no layer with inputs
    and outputs.

    `solve` is `V / (S + damping)`, zero where that is below `eps^2` of the largest entry. The
    statistic `S [1, n]`, for example the mean square of per-example gradients, is handed in
    ready-made.

    Returns:
      A `Block` whose `measure` raises: rows of inputs and output gradients do not determine `S`.

    >>> block = diagonal()
    >>> inverse = block.factorize(jnp.array([[1.0, 3.0]]), jnp.float32(1.0))
    >>> print(block.solve(inverse, jnp.ones((1, 2)), jnp.float32(1.0)))
    [[0.5  0.25]]

    Reference: Martens, New Insights and Perspectives on the Natural Gradient Method (2020).
    """

    def init(layer: Layer, dtype: jnp.dtype) -> Float[Array, "p q"]:
        p, q = layer.shape
        return jnp.ones((p, q), dtype)

    def measure(a: Array, g: Array | None, use: Use) -> NoReturn:
        raise ValueError(
            "diagonal: measure got rows of a layer; expected its statistic [1, n] ready-made. Let "
            "the estimator measure the parameters (mean square of per-example gradients), or use "
            "the block of the layer's kind."
        )

    def factorize(statistic: Array, damping: Array) -> Array:
        # the inverse is the statistic itself: the damping of the step enters in every solve
        return jnp.maximum(statistic, 0)

    def solve(inverse: Array, v: Array, damping: Array) -> Array:
        # entries of S are no sums with rounding of the largest in them
        return damped_quotient(v, inverse, damping, exact=True)

    def multiply(statistic: Array, v: Array) -> Array:
        return statistic * v

    def root_solve(inverse: Array, z: Array, damping: Array) -> Array:
        # R = diag(S + damping)^{-1/2}
        return damped_root(z, inverse, damping, exact=True)

    def logdet(
        inverse: Array,
        damping: Array,
        shape: tuple[int, int],
    ) -> Array:
        return damped_logdet(inverse, damping, exact=True)

    return Block(
        "diagonal",
        init,
        measure,
        factorize,
        solve,
        multiply,
        root_solve=root_solve,
        logdet=logdet,
    )
