"""Terms of the rearranged Fisher block of a layer: power steps, what they leave over, directions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Layer
from kfac_optax.blocks.kronecker.kronecker import Factors
from kfac_optax.linalg.division import positive_or_one
from kfac_optax.linalg.factorize import symmetrize
from kfac_optax.linalg.in_order import after
from kfac_optax.linalg.rearrangement import contract
from kfac_optax.linalg.tikhonov import factor_shifts
from kfac_optax.linalg.two_term import Pencil, pencil


class Term(NamedTuple):
    """One power step from directions `R`, `S` of unit norm; all of it linear in the Fisher block."""

    inputs: Float[Array, "p p"]  # M S
    outputs: Float[Array, "q q"]  # M^T R
    scale: Float[Array, ""]  # <R, M S>


class TwoTerms(NamedTuple):
    """Both power steps; all of it linear in the Fisher block, the factors of K-FAC aside."""

    first: Term | Factors
    second: Term
    left: Float[Array, ""]  # <R_2, first.inputs>
    right: Float[Array, ""]  # <first.outputs, S_2>


def identity_term(layer: Layer, dtype: jnp.dtype) -> Term:
    """The step from identities where `F` is one."""
    p, q = layer.shape
    # M I / sqrt(q) = sqrt(q) I, M^T I / sqrt(p) = sqrt(p) I
    root_q = jnp.sqrt(jnp.asarray(q, dtype))
    root_p = jnp.sqrt(jnp.asarray(p, dtype))
    inputs = root_q * jnp.eye(p, dtype=dtype)
    outputs = root_p * jnp.eye(q, dtype=dtype)
    return Term(inputs, outputs, root_q * root_p)


def start_directions(term: Term | Factors) -> Factors:
    """Identities of unit norm."""

    def direction(x: Array) -> Array:
        identity = jnp.eye(len(x), dtype=x.dtype)
        return unit(identity, 0.0)

    return Factors(direction(term.inputs), direction(term.outputs))


def power_step(
    a: Array,
    g: Array,
    directions: Factors,
    examples: int,
    precision: jax.lax.PrecisionLike,
) -> Term:
    """Both products with the rearranged block, from rows."""
    inputs = contract(a, g, directions.outputs, precision=precision) / examples
    outputs = contract(g, a, directions.inputs, precision=precision) / examples
    scale = jnp.vdot(directions.inputs, inputs, precision="highest")
    return Term(inputs, outputs, scale)


def next_directions(old: Factors, term: Term | Factors) -> Factors:
    """Those of the products, in unit norm."""
    inputs = unit(term.inputs, old.inputs)
    outputs = unit(term.outputs, old.outputs)
    return Factors(inputs, outputs)


def unit(x: Array, otherwise: Array | float) -> Array:
    """`x` with Frobenius norm one, or something else where that vanishes or overflows."""
    size = jnp.linalg.norm(x)
    usable = jnp.isfinite(size) & (size > 0)
    divisor = jnp.where(usable, size, 1)
    return jnp.where(usable, x / divisor, otherwise)


def balanced(term: Term) -> Factors:
    """Two factors of about the same size with the product `(M S) (x) (M^T R) / <R, M S>`."""
    usable = term.scale > 0
    root = jnp.sqrt(positive_or_one(term.scale))
    inputs = jnp.where(usable, term.inputs / root, 0)
    outputs = jnp.where(usable, term.outputs / root, 0)
    return Factors(inputs, outputs)


def rest_of(terms: TwoTerms) -> Term:
    """The power step of what the first term leaves of the block."""
    first, second = terms.first, terms.second
    scale = _scale(first)
    # E = M - inputs outputs^T / scale, and <first.outputs, S_2> = <R_1, M S_2>
    return Term(
        second.inputs - terms.right / scale * first.inputs,
        second.outputs - terms.left / scale * first.outputs,
        second.scale - terms.left / scale * terms.right,
    )


def _scale(first: Term | Factors) -> Array | float:
    if isinstance(first, Term):
        return positive_or_one(first.scale)
    return 1.0


def products_of(terms: TwoTerms) -> tuple[Factors, Factors]:
    """Both Kronecker products."""
    first, rest = terms.first, rest_of(terms)
    root_a = jnp.sqrt(jnp.linalg.norm(rest.inputs))
    root_g = jnp.sqrt(jnp.linalg.norm(rest.outputs))
    # all three are sigma_2 in the end; before, <R, E S> alone may be next to nothing
    size = jnp.maximum(jnp.abs(rest.scale), root_a * root_g)
    sign = jnp.where(rest.scale < 0, -1, 1)
    signed = sign * positive_or_one(size)
    second = Factors(rest.inputs, rest.outputs / signed)
    return Factors(first.inputs, first.outputs / _scale(first)), second


def random_directions(term: Term) -> Factors:
    """Symmetric matrices of unit norm that are no special ones."""
    key = jax.random.key(0)

    def direction(x: Array) -> Array:
        draw = jax.random.normal(key, x.shape, x.dtype)
        return unit(symmetrize(draw), 0.0)

    return Factors(direction(term.inputs), direction(term.outputs))


def pencils_of(
    terms: TwoTerms, damping: Array, precision: jax.lax.PrecisionLike
) -> tuple[Pencil, Pencil]:
    """What diagonalises both terms at once, the first with the damping shared out to its factors."""
    one, two = products_of(terms)
    # the second term has no part in how the damping is shared out
    shift, output_shift = factor_shifts(*one, damping)
    inputs = pencil(one.inputs, two.inputs, shift, precision=precision)
    ready = after(one.outputs, inputs.values)
    return inputs, pencil(ready, two.outputs, output_shift, precision=precision)
