"""Links of a chain of layers: each layer's gradient regressed on the next layer's."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import PyTree
from kfac_optax.blocks.kronecker.kronecker import DenseInverse, Factors
from kfac_optax.linalg.in_order import after
from kfac_optax.linalg.kronecker_products import sandwich, trace_ratio
from kfac_optax.linalg.two_term import Pencil, pencil, two_term_solve


class Link(NamedTuple):
    """How layer i hangs on layer i+1: regressions `Psi = X_{i,i+1} X_{i+1}^{-1}`, and
    `(X_i, Psi X_{i+1} Psi^T)`.
    """

    inputs: Float[Array, "p next_p"]
    outputs: Float[Array, "q next_q"]
    inputs_pencil: Pencil
    outputs_pencil: Pencil


def link_of(
    own: Factors,
    cross: Factors,
    following: DenseInverse,
    *,
    damping: Array,
    precision: jax.lax.PrecisionLike,
) -> Link:
    """The link of a layer to the next, from its factors and the damped inverses of that one."""
    # the damping of the layer's own block: pi sqrt(damping) and sqrt(damping) / pi
    pi, root = trace_ratio(*own), jnp.sqrt(damping)
    # Psi = A_{i,i+1} A_{i+1}^{-1} and Phi = G_{i,i+1} G_{i+1}^{-1}
    psi = jnp.matmul(cross.inputs, following.inputs, precision=precision)
    phi = jnp.matmul(cross.outputs, following.outputs, precision=precision)
    # Psi A_{i+1} Psi^T = C A_{i+1}^{-1} C^T, what the next layer explains of this one
    explained_inputs = _explained(cross.inputs, following.inputs, precision)
    explained_outputs = _explained(cross.outputs, following.outputs, precision)
    # both sides of A (x) G - (Psi A Psi^T) (x) (Phi G Phi^T), diagonalised
    inputs = pencil(own.inputs, explained_inputs, pi * root, precision=precision)
    ready = after(own.outputs, inputs)
    outputs = pencil(ready, explained_outputs, root / pi, precision=precision)
    return Link(psi, phi, inputs, outputs)


def _explained(
    cross: Array,
    inverse: Array,
    precision: jax.lax.PrecisionLike,
) -> Array:
    return sandwich(cross, inverse, cross.T, precision=precision)


def solve_chain(
    inverse: dict[str, Link],
    v: list[Array],
    last: Array,
    precision,
) -> list[Array]:
    """`X_i` of all layers; the last one's own solve is given."""

    def first_two(
        link: Link,
        v: Array,
        following: Array,
    ) -> tuple[Array, Array]:
        # U_i = V_i - Psi_i V_{i+1} Phi_i^T, then Y_i
        regressed = sandwich(link.inputs, following, link.outputs.T, precision=precision)
        u = v - regressed
        y = two_term_solve(
            link.inputs_pencil,
            link.outputs_pencil,
            u,
            minus=True,
            precision=precision,
        )
        # Psi_i^T Y_i Phi_i, to be taken off X_{i+1}
        explained = sandwich(link.inputs.T, y, link.outputs, precision=precision)
        return y, explained

    # all links are independent of one another: no recursion along the chain
    y = [*v[:-1], last]
    explained = [jnp.zeros((), last.dtype)] * len(v)
    shapes = [x.shape for x in v]
    for name, members in links_by_shape(shapes).items():
        own = jnp.stack([v[i] for i in members])
        following = jnp.stack([v[i + 1] for i in members])
        solved, of_next = jax.vmap(first_two)(inverse[name], own, following)
        for i, mine, taken_off in zip(members, solved, of_next, strict=True):
            y[i] = mine
            explained[i + 1] = taken_off
    return [x - e for x, e in zip(y, explained, strict=True)]


def links_by_shape(shapes: Sequence[tuple[int, ...]]) -> dict[str, list[int]]:
    """Links `(i, i + 1)` of the chain by their shapes, `i` in order: each group is one batched
    call.
    """
    groups: dict[str, list[int]] = {}
    for i, (own, following) in enumerate(itertools.pairwise(shapes)):
        name = "{}x{}_{}x{}".format(*own, *following)
        groups.setdefault(name, []).append(i)
    return groups


def stacked(trees: Sequence[PyTree]) -> PyTree:
    """Links of equal shapes on a new axis 0."""
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)
