"""Scores about their mean over the batch, for heads that say `centred = True`: amplitudes that are
not normalised, where a change of the norm is no change.

With weights `w` of mean one the output Hessian of a centred head is `H (W - w w^T / N)` instead of
`H W`: it couples the examples.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._types import Layers
from kfac_optax.estimators.output_cotangents import Naturals, OutputCotangents
from kfac_optax.estimators.reductions import devices_of
from kfac_optax.linalg.division import positive_or_one

Natural = tuple[jax.Array, ...]


def is_centred(head: Any) -> bool:
    """Whether the scores of a head are taken about their mean."""
    return bool(getattr(head, "centred", False))


def about_mean(values: Natural, root: Any, axis_name: Any) -> Natural:
    """`v - sum(w v) / sum(w)`, the sums over all devices; `root` is that of the weights up to a
    factor, or `None`.
    """

    def apply(v: jax.Array) -> jax.Array:
        # sums over the batch in float32 at least, whatever the model computes in
        wide = v.astype(jnp.promote_types(v.dtype, jnp.float32))
        shares = _shares(wide, root, axis_name)
        mean = _sum(shares * wide, axis_name)
        return (wide - mean).astype(v.dtype)

    return tuple(map(apply, values))


def centred_cotangents(
    cotangents: OutputCotangents,
    heads: Sequence[Any],
    roots: Sequence[Any],
    axis_name: Any = None,
) -> OutputCotangents:
    """The same cotangents `c`, less what their pullback has of the mean score.

    `sum_b c_b (O_b - mean O) = sum_b (c_b - w_b sum(c) / sum(w)) O_b`.

    Args:
      cotangents: cotangents.
      heads: of the prediction.
      roots: of the weights `w` of each of them, or `None`.
      axis_name: of devices, where the mean is that of all of them; without it each takes that of
        its own walkers, as is right where it squares sums of its own.
    """
    # most predictions have no such head: their cotangents are left as they are
    if not any(map(is_centred, heads)):
        return cotangents

    def make(k: Any) -> Naturals:
        made = []
        for cotangent, head, root in zip(cotangents.make(k), heads, roots, strict=True):
            if is_centred(head):
                cotangent = _without_mean(cotangent, root, axis_name)
            made.append(cotangent)
        return made

    return OutputCotangents(cotangents.count, make)


def _without_mean(cotangent: Natural, root: Any, axis_name: Any) -> Natural:
    """The transpose of `about_mean`."""

    def apply(c: jax.Array) -> jax.Array:
        # c_b - w_b sum(c) / sum(w)
        wide = c.astype(jnp.promote_types(c.dtype, jnp.float32))
        shares = _shares(wide, root, axis_name)
        total = _sum(wide, axis_name)
        return (wide - shares * total).astype(c.dtype)

    return tuple(map(apply, cotangent))


def _shares(
    x: jax.Array,
    root: Any,
    axis_name: Any,
) -> jax.Array:
    """`w / sum(w)`; zeros where no term counts.

    The root of a head has a factor that stands for the number of its terms.
    """
    # all terms count the same, on all devices
    if root is None or jnp.ndim(root) == 0:
        terms = x.size * devices_of(axis_name)
        return jnp.full(x.shape, 1 / max(terms, 1), x.dtype)
    # the factor in the root goes out in the quotient
    weights = jnp.square(root)
    total = _sum(weights, axis_name)
    return weights / positive_or_one(total)


def _sum(x: jax.Array, axis_name: Any) -> jax.Array:
    # of this device, then of all
    total = jnp.sum(x)
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def with_remark(layers: Layers, heads: Sequence[Any]) -> Layers:
    """The layers with a line under their table that says which statistics are not centred."""
    # each name once, in the order of the heads
    centred = filter(is_centred, heads)
    names = dict.fromkeys(type(head).__name__ for head in centred)
    if not names or not layers.layers:
        return layers
    remark = (
        f"{', '.join(names)}: exact products and sums over the batch are centred; statistics of "
        "rows of single walkers are second moments about zero"
    )
    return dataclasses.replace(layers, remarks=(*layers.remarks, remark))
