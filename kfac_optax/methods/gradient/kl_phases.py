"""Shampoo's phases with statistics whose product is nearest to the second moment."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax.linalg.division import positive_or_one
from kfac_optax.methods.gradient.axes import Group
from kfac_optax.methods.gradient.kl_statistics import kl_averaged_in
from kfac_optax.methods.gradient.length import no_longer_than, no_longer_than_fresh
from kfac_optax.methods.gradient.phases import ByAxis, Phases, Weights, diagonal_root


def levelled(factors: ByAxis, inverses: ByAxis) -> tuple[ByAxis, ByAxis]:
    """`c_i H_i` and `c_i^(-1/2) H_i^(-1/2)` of equal mean diagonal entries, `c_1 ... c_k = 1`.

    What is made of them stays as it is: the product alone is determined. Where some `S_i` has a
    lower rank than `H_i` has rows, as of an input that is always zero, one factor would otherwise
    grow and another fall until they leave the range of numbers.

    >>> halves, _ = levelled({"0": jnp.full((1, 2), 8.0), "1": jnp.full((1, 3), 2.0)}, {})
    >>> print(halves["0"].round(3), halves["1"].round(3))
    [[4. 4.]] [[4. 4. 4.]]
    """
    sizes = {i: _mean_entry(h) for i, h in factors.items()}
    # roots before products, which would overflow
    middle = math.prod(positive_or_one(size) ** (1 / len(sizes)) for size in sizes.values())
    # of copies with nothing measured there is nothing to bring to one size
    known = math.prod(size > 0 for size in sizes.values())
    by, new = {}, {}
    for i, h in factors.items():
        by[i] = jnp.where(known, middle / positive_or_one(sizes[i]), 1)
        new[i] = h * by[i].reshape(-1, *[1] * (h.ndim - 1))
    roots = {i: w / jnp.sqrt(by[i])[:, None, None] for i, w in inverses.items()}
    return new, roots


def _mean_entry(factor: jax.Array) -> jax.Array:
    """The mean diagonal entry of every copy, `[copies]`."""
    if factor.ndim == 3:
        factor = jnp.diagonal(factor, 0, 1, 2)
    return jnp.mean(factor, axis=1)


def kl_phases(plain: Phases) -> Phases:
    """Shampoo's phases for roots `H^(-1/2)`, with these statistics."""

    def whiten(
        group: Group,
        step: Any,
        factors: ByAxis,
        inverses: ByAxis,
    ) -> ByAxis:
        """The roots of the step before; those of diagonals are never stale."""
        ridge = step.value("ridge")
        whiteners = dict(inverses)
        for axis, factor in factors.items():
            if axis not in inverses:
                whiteners[axis] = diagonal_root(factor, 2, ridge)
        return whiteners

    def apply(
        group: Group,
        step: Any,
        factors: ByAxis,
        inverses: ByAxis,
        weights: Weights,
    ):
        u = plain.apply(group, step, factors, inverses, weights)
        _, new = weights
        if len(group.block) == 1:
            return no_longer_than_fresh(group, u, new)
        # as in the statistics: a mean square of 1 / (1 - e) at most
        entries = math.prod(group.block)
        return no_longer_than(group, u, entries / new)

    return plain._replace(
        take_in=kl_averaged_in,
        apply=apply,
        whiten=whiten,
        level=levelled,
    )
