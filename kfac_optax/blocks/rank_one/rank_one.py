"""Blocks of rank one from mean inputs and mean output gradients: Eva and Eva-f."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Block, Layer, Use
from kfac_optax._validate import check_choice
from kfac_optax.blocks.kronecker.kronecker import SHARING
from kfac_optax.blocks.use_rows import input_rows
from kfac_optax.linalg.weighted_rows import index_counts, keep_rows


class Means(NamedTuple):
    """Mean input `a`, with the bias coordinate, and mean output gradient `b`."""

    inputs: Float[Array, " p"]
    outputs: Float[Array, " q"] | None  # None where only inputs are measured


def rank_one(
    outputs: bool = True,
    *,
    sharing: str = "expand",
    precision: jax.lax.PrecisionLike = "highest",
) -> Block:
    """Block of rank one, `F ~ c c^T`, `c = vec(a b^T)`, with `a` the mean input of a layer and `b`
    its mean output gradient.

    `a = mean_rows w a_r`, `b = mean_rows g_r` over examples, positions and uses. The inverse is in
    closed form, of the damping of the step, and takes `O(p + q)` of memory; with `V [p, q]`:

    - `outputs=True` (Eva): `V -> [V - a (a^T V b) b^T / (damping + |a|^2 |b|^2)] / damping`;
    - `outputs=False` (Eva-f), `F ~ a a^T (x) I`: `V -> [V - a (a^T V) / (damping + |a|^2)] /
      damping`, from inputs alone.

    Eva needs the output gradients of the loss itself: those of `fisher` and `ggn` have mean zero.
    `first_moments` of the block says so to the estimator, and a transformation has such blocks only.
    Eva-f takes any estimator. The damping has to be positive; `V / damping` is what is left of
    vanishing means.

    Tokens `[*rows]` are one-hot inputs. Scales and shifts, and tables that are softmax heads too,
    are no product of one input and one output.

    Args:
      outputs: whether output gradients are measured.
      sharing: positions that share a weight: `"expand"` takes the mean of both over positions, as
        the paper; `"reduce"` adds the output gradients of an example up, so that `a b^T` is the
        gradient where inputs or output gradients do not vary. Then patches are not formed.
      precision: matmul precision of solves.

    Returns:
      A `Block` with `Means` as statistic.

    Raises:
      ValueError: unknown `sharing`; inputs that do not fit the layer, output gradients missing.

    >>> block = rank_one()
    >>> means = Means(jnp.array([1.0, 0.0]), jnp.array([1.0]))
    >>> print(block.solve(block.factorize(means, 1.0), jnp.ones((2, 1)), 1.0).ravel())
    [0.5 1. ]

    Reference: Zhang, Shi & Li, Eva: Practical Second-order Optimization with Kronecker-vectorized
      Approximation (2023).
    """
    check_choice("rank_one", "sharing", sharing, SHARING)

    def init(layer: Layer, dtype: jnp.dtype) -> Means:
        p, q = layer.shape
        of_outputs = jnp.zeros(q, dtype) if outputs else None
        return Means(jnp.zeros(p, dtype), of_outputs)

    def measure(a: Array, g: Array | None, use: Use) -> Means:
        # a = mean_rows w a_r, b = mean_rows g_r, whose whole weight is in g already
        inputs = _sum_of_inputs(a, use) / use.rows
        if not outputs:
            return Means(inputs, None)
        if g is None:
            raise ValueError(
                "rank_one: measure got no output gradients, since this estimator measures inputs "
                "only. Use empirical_fisher, or rank_one(outputs=False) (eva_f)."
            )
        total = _sum_of_rows(g.astype(use.dtype))
        return Means(inputs, total / use.rows)

    def factorize(means: Means, damping: Array) -> Means:
        return means

    def solve(means: Means, v: Array, damping: Array) -> Array:
        # Sherman and Morrison: (c c^T + damping I)^{-1} V = (V - c c^T V / (damping + |c|^2)) /
        # damping
        total = damping + squared_norm(means)
        return (v - multiply(means, v) / total) / damping

    def squared_norm(means: Means) -> Array:
        # |c|^2 = |a|^2 |b|^2
        size = jnp.vdot(means.inputs, means.inputs, precision=precision)
        if means.outputs is None:
            return size
        return size * jnp.vdot(means.outputs, means.outputs, precision=precision)

    def root_solve(means: Means, z: Array, damping: Array) -> Array:
        # (I - b c c^T) / sqrt(damping), whose square has to shrink c by root^2
        total = damping + squared_norm(means)
        root = jnp.sqrt(damping / total)
        along = multiply(means, z) / (total * (1 + root))
        return (z - along) / jnp.sqrt(damping)

    def logdet(
        means: Means,
        damping: Array,
        shape: tuple[int, int],
    ) -> Array:
        p, q = shape
        copies = q if means.outputs is None else 1  # of the direction that is not damping alone
        alone = (p * q - copies) * jnp.log(damping)
        return alone + copies * jnp.log(damping + squared_norm(means))

    def multiply(means: Means, v: Array) -> Array:
        # a^T V [q], and for Eva (a^T V b) b
        along = jnp.matmul(means.inputs, v, precision=precision)
        if means.outputs is not None:
            along = jnp.vdot(along, means.outputs, precision=precision) * means.outputs
        # c c^T V = a (a^T V b) b^T, [p, q]
        return jnp.outer(means.inputs, along)

    said = [] if outputs else ["inputs"]
    if sharing != "expand":
        said.append(sharing)
    name = f"rank one ({', '.join(said)})" if said else "rank one"
    return Block(
        name,
        init,
        measure,
        factorize,
        solve,
        multiply,
        sharing=sharing,
        first_moments=outputs,
        root_solve=root_solve,
        logdet=logdet,
    )


def _sum_of_inputs(a: Array, use: Use) -> Array:
    """`sum_rows w a`, with the bias coordinate."""
    # one-hot inputs: the sum of rows counts tokens
    if jnp.issubdtype(a.dtype, jnp.integer):
        return index_counts(a, use.inputs, use.weights, use.dtype)
    if use.inputs and a.shape[-1] != use.inputs:
        raise ValueError(
            f"rank_one: measure got inputs of size {a.shape[-1]}; expected {use.inputs}, as the "
            "layer's weight has. Scales, shifts and tied tables have no such block: leave them "
            "out, as the presets eva and eva_f do (normalization='pass')."
        )
    a = keep_rows(input_rows(a, use), use.weights)
    if use.weights is not None:
        a = a * use.weights[..., None].astype(use.dtype)
    return _sum_of_rows(a)


def _sum_of_rows(x: Array) -> Array:
    return jnp.sum(x, tuple(range(x.ndim - 1)))
