"""What K-BFGS keeps of a layer, and how it goes on from step to step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Block, Bucket, Use
from kfac_optax.blocks.rank_one.rank_one import Means, rank_one
from kfac_optax.blocks.use_rows import input_rows
from kfac_optax.linalg.bfgs import Pairs, add_pair, apply_bfgs, double_damped
from kfac_optax.linalg.factorize import psd_inverse
from kfac_optax.linalg.weighted_rows import weighted_gram

POWELL = 0.2  # how far `s^T y` may fall below `y^T H y`


class LayerPairs(NamedTuple):
    """What is kept of one layer, or of all in a bucket on a leading axis."""

    inputs: Float[Array, "p p"]  # E[a a^T]
    inverse_inputs: Any  # [p, p]
    inverse_outputs: Any  # [q, q], or Pairs
    step: Float[Array, " q"]  # average change of mean pre-activations
    change: Float[Array, " q"]  # of their mean gradients


class Moments(NamedTuple):
    """Of one batch: second moments of inputs, and both means."""

    inputs: Float[Array, "p p"]
    means: Means


class Numbers(NamedTuple):
    """Of one step, for all layers."""

    root: Array  # of the damping
    weight: Array  # of what was averaged before
    first: Array  # whether nothing was


def moments_block(precision: jax.lax.PrecisionLike) -> Block:
    """Measures `Moments`, where `rank_one` measures means."""
    plain = rank_one(precision=precision)

    def measure(a: jax.Array, g: jax.Array | None, use: Use) -> Moments:
        means = plain.measure(a, g, use)
        rows = input_rows(a, use)
        inputs = weighted_gram(rows, use.weights, precision=precision) / use.examples
        return Moments(inputs, means)

    return plain._replace(name="moments and means", measure=measure)


def start_pairs(bucket: Bucket, memory: int | None, dtype: Any) -> LayerPairs:
    """Of one layer of a bucket; `memory` pairs of its outputs, or `None` for the matrix."""
    p, q = bucket.shape
    outputs: Any = jnp.eye(q, dtype=dtype)
    if memory is not None:
        outputs = Pairs(jnp.zeros((memory, q), dtype), jnp.zeros((memory, q), dtype))
    nothing = jnp.zeros((p, p), dtype)
    zeros = (jnp.zeros(q, dtype), jnp.zeros(q, dtype))
    return LayerPairs(nothing, jnp.eye(p, dtype=dtype), outputs, *zeros)


def direction(
    pairs: LayerPairs, moments: Moments, v: Array, numbers: Numbers, *, precision: Any
) -> tuple[LayerPairs, Float[Array, "p q"]]:
    """New second moments of one layer, and `H_A V H_G`."""
    # A <- e A + (1 - e) A_new
    inputs = numbers.weight * pairs.inputs + (1 - numbers.weight) * moments.inputs
    # where it starts from; later steps factorise nothing
    inverse = jax.lax.cond(
        numbers.first, lambda: psd_inverse(inputs, numbers.root), lambda: pairs.inverse_inputs
    )
    right = apply_bfgs(pairs.inverse_outputs, v, precision=precision)
    step = jnp.matmul(inverse, right, precision=precision)
    return pairs._replace(inputs=inputs, inverse_inputs=inverse), step


def with_pairs(
    pairs: LayerPairs, before: Means, behind: Means, moved: Array, numbers: Numbers, precision: Any
) -> LayerPairs:
    """Both inverses of one layer with a pair more.

    Args:
      pairs: those before.
      before: means in front of the step.
      behind: means behind it.
      moved: `[2, p, q]`, its weights before and behind.
      numbers: of the step.
      precision: of products.
    """
    assert before.outputs is not None and behind.outputs is not None  # both are measured
    # the mean of pre-activations is that of the mean input
    old, new = (
        jnp.matmul(a, w, precision=precision)
        for a, w in zip((before.inputs, behind.inputs), moved, strict=True)
    )
    share = 1 - numbers.weight
    step = numbers.weight * pairs.step + share * (new - old)
    change = numbers.weight * pairs.change + share * (behind.outputs - before.outputs)
    kept, bound = pairs.inverse_outputs, numbers.root
    s, y = double_damped(kept, step, change, inverse_bound=POWELL, bound=bound, precision=precision)
    # of the inputs' quadratic the change is known for any step, and along it positive
    probe = jnp.matmul(pairs.inverse_inputs, before.inputs, precision=precision)
    answer = jnp.matmul(pairs.inputs, probe, precision=precision) + numbers.root * probe
    return pairs._replace(
        inverse_inputs=add_pair(pairs.inverse_inputs, probe, answer, precision=precision),
        inverse_outputs=add_pair(kept, s, y, precision=precision),
        step=step,
        change=change,
    )
