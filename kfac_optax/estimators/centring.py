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

Natural = tuple[jax.Array, ...]


def is_centred(head: Any) -> bool:
    """Whether the scores of a head are taken about their mean."""
    return bool(getattr(head, "centred", False))


def about_mean(values: Natural, root: Any, axis_name: Any) -> Natural:
    """`v - mean(w v)`, the mean over all devices; `root` is the root of the weights, or `None`."""

    def apply(v: jax.Array) -> jax.Array:
        wide = v.astype(jnp.promote_types(v.dtype, jnp.float32))
        mean = jnp.mean(wide if root is None else jnp.square(root) * wide)
        mean = mean if axis_name is None else jax.lax.pmean(mean, axis_name)
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
    if not any(map(is_centred, heads)):
        return cotangents

    def make(k: Any) -> Naturals:
        triples = zip(cotangents.make(k), heads, roots, strict=True)
        return [_without_mean(c, root, axis_name) if is_centred(h) else c for c, h, root in triples]

    return OutputCotangents(cotangents.count, make)


def _without_mean(cotangent: Natural, root: Any, axis_name: Any) -> Natural:
    def apply(c: jax.Array) -> jax.Array:
        wide = c.astype(jnp.promote_types(c.dtype, jnp.float32))
        weights = jnp.ones_like(wide) if root is None else jnp.square(root)
        sums = jnp.stack([jnp.sum(wide), jnp.sum(weights)])
        found, total = sums if axis_name is None else jax.lax.psum(sums, axis_name)
        mean = found / jnp.where(total > 0, total, 1)
        return (wide - weights * mean).astype(c.dtype)

    return tuple(map(apply, cotangent))


def with_remark(layers: Layers, heads: Sequence[Any]) -> Layers:
    """The layers with a line under their table that says which statistics are not centred."""
    names = dict.fromkeys(type(head).__name__ for head in heads if is_centred(head))
    if not names or not layers.layers:
        return layers
    remark = (
        f"{', '.join(names)}: exact products and sums over the batch are centred; statistics of "
        "rows of single walkers are second moments about zero"
    )
    return dataclasses.replace(layers, remarks=(*layers.remarks, remark))
