"""`<U_i, V_i>`: what preconditioned gradients have in common with the gradients themselves."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kfac_optax.linalg.powers import Scaled, exponent_or_zero, times_power


class FromRows(NamedTuple):
    """A preconditioned gradient `U = b^T h` of `V = a^T g`, for matrices of one shape."""

    update: Float[Array, "copies p q"]
    solved: tuple[Float[Array, "copies R p"], Float[Array, "copies R q"]]  # b and h
    rows: tuple[Float[Array, "copies R p"], Float[Array, "copies R q"]]  # a and g

    @property
    def few(self) -> bool:
        """Whether products of all pairs of rows take no more than the gradient itself."""
        a, g = self.rows
        (_, n, p), q = a.shape, g.shape[-1]
        return n * (p + q) <= p * q


def of_matrices(
    update: Float[Array, "copies p q"],
    gradient: Float[Array, "copies p q"],
) -> Scaled:
    """`<U, V>` of every matrix.

    >>> slopes = of_matrices(jnp.full((1, 2, 2), 3.0), jnp.ones((1, 2, 2)))
    >>> print(slopes.values * 2.0**slopes.exponent)
    [12.]
    """
    u, of_u = _ordinary(update)
    v, of_v = _ordinary(gradient)
    return Scaled(jnp.sum(u * v, axis=(1, 2)), of_u + of_v)


def of_rows(known: FromRows) -> Scaled:
    """The same without the gradient: `<b^T h, a^T g> = sum_nm (b a^T)_nm (h g^T)_nm`.

    >>> b, h, a, g = (jnp.full((1, 1, 2), x) for x in (1.0, 2.0, 3.0, 4.0))
    >>> update = jnp.matmul(b.mT, h)
    >>> slopes = of_rows(FromRows(update, (b, h), (a, g)))
    >>> print(slopes.values * 2.0**slopes.exponent, jnp.sum(update * jnp.matmul(a.mT, g)))
    [96.] 96.0
    """
    scaled = [_ordinary(x) for x in (*known.solved, *known.rows)]
    b, h, a, g = (x for x, _ in scaled)
    # [copies, R, R]
    of_inputs = jnp.matmul(b, a.mT, precision="highest")
    of_outputs = jnp.matmul(h, g.mT, precision="highest")
    exponent = sum((e for _, e in scaled), jnp.zeros((), jnp.int32))
    return Scaled(jnp.sum(of_inputs * of_outputs, axis=(1, 2)), exponent)


def in_one_scale(found: Sequence[Scaled]) -> Scaled:
    """All of them behind one another, with one exponent.

    >>> small, large = Scaled(jnp.ones(1), jnp.int32(-300)), Scaled(jnp.ones(2), jnp.int32(1))
    >>> together = in_one_scale([small, large])
    >>> print(together.values, together.exponent)
    [0. 1. 1.] 1
    """
    if not found:
        return Scaled(jnp.zeros((1,)), jnp.zeros((), jnp.int32))
    # what a product of two numbers has at most; beyond it an update overflows
    end = 2 * (jnp.finfo(found[0].values.dtype).maxexp - 3)
    # of a slope of zero the exponent says nothing
    sizes = [jnp.where(jnp.all(x.values == 0), -end, x.exponent) for x in found]
    largest = jnp.clip(jnp.max(jnp.stack(sizes)), -end, end)
    values = []
    for x in found:
        shorter = jnp.clip(x.exponent - largest, -end, 0)
        values.append(times_power(x.values, shorter))
    return Scaled(jnp.concatenate(values), largest)


def _ordinary(x: Float[Array, "copies ..."]) -> tuple[Float[Array, "copies ..."], Int[Array, ""]]:
    """An array times a power of two that makes its entries at most one, and the exponent."""
    exponent = exponent_or_zero(jnp.max(jnp.abs(x), initial=0)).astype(jnp.int32)
    return times_power(x, -exponent), exponent
