"""Rows as a site gives them, laid out as its layer needs them."""

import jax
import jax.numpy as jnp

from kfac_optax.capture.sites import Site


def stack_first(x: jax.Array, site: Site, features: int) -> jax.Array:
    """Rows `[*scans, *stacked, groups, N, *positions, *features] -> [copies, N, *positions, *steps, *features]`.

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
