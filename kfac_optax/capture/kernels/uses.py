"""Equations in which a kernel meets data, and what computes them with the kernel's parts."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from kfac_optax.capture.jaxpr.calls import jaxprs_inside
from kfac_optax.capture.kernels.convolutions import convolution
from kfac_optax.capture.kernels.expression import Expression
from kfac_optax.capture.kernels.known import is_real
from kfac_optax.capture.kernels.parts import product
from kfac_optax.capture.kernels.table_parts import is_lookup, lookup

PRODUCTS = ("dot_general", "conv_general_dilated", "gather")
# (kernel, the other operand, values of the kernel's leaves) -> what the equation computes
Multiplied = Callable[..., jax.Array]


def multiplies(jaxpr: Any) -> bool:
    """Whether a kernel may meet data in a jaxpr, or in what it contains."""
    here = any(eqn.primitive.name in PRODUCTS for eqn in jaxpr.eqns)
    return here or any(map(multiplies, jaxprs_inside(jaxpr)))


def ways(eqn: Any) -> Iterator[tuple[int, Multiplied]]:
    """Operands of an equation that may be a kernel, and what computes it with the kernel's parts."""
    name, p = eqn.primitive.name, eqn.params
    # a placement of the output is that of one product; integers and flags are linear in nothing
    if name == "dot_general" and p.get("out_sharding") is None and all(map(is_real, eqn.invars)):
        yield 0, functools.partial(product, eqn, 0)
        yield 1, functools.partial(product, eqn, 1)
    if name == "conv_general_dilated" and p["batch_group_count"] == 1:
        yield 1, functools.partial(convolution, eqn)
    if name == "gather" and is_lookup(eqn) and is_real(eqn.invars[0]):
        yield 0, functools.partial(lookup, eqn)


def multiplied(
    eqn: Any,
    multiply: Multiplied,
    kernel: Expression,
    leaves: Sequence[Any],
    x: jax.Array,
    *values: jax.Array,
) -> jax.Array:
    """What the equation computes, given values of the leaves in that order."""
    # a leaf is known by what it is in the program, of which there is one object
    by_leaf = dict(zip(map(id, leaves), values, strict=True))
    out = multiply(kernel, x, by_leaf)
    return out.astype(eqn.outvars[0].aval.dtype)
