"""Rows as a site gives them, laid out as its layer needs them."""

import math

import jax
import jax.numpy as jnp

from kfac_optax.capture.sites import Site


def stack_first(x: jax.Array, site: Site, features: int) -> jax.Array:
    """Rows `[*scans, *stacked, groups, N, *positions, *features] -> [copies, N, *positions, *steps,
    *features]`.

    The steps in time of a layer are further positions.
    """
    loops = [i for i, (_, over_layers) in enumerate(site.scans) if not over_layers]
    end = x.ndim - features
    x = jnp.moveaxis(x, loops, range(end - len(loops), end))
    return x.reshape(-1, *x.shape[len(site.stack) + 1 :])


def steps_in_a_row(x: jax.Array, site: Site, features: int) -> jax.Array:
    """As `stack_first`, all positions and steps on one axis."""
    x = stack_first(x, site, features)
    return x.reshape(*x.shape[:2], -1, *x.shape[x.ndim - features :])


def without_examples(site: Site, examples: int) -> bool:
    """Whether the rows of a site cannot be divided among the examples: each belongs to all of them.

    Then one row has the sum of the examples' gradients. Its square has products of different
    examples, which cancel only where the terms are independent with mean zero. Rows that depend on
    the arguments and are at least as many as the examples may be the examples', and are taken to
    be.
    """
    return not site.varies or math.prod(site.row_shape) < examples
