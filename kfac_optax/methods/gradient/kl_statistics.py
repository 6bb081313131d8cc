"""Statistics of axes whose product is nearest to the second moment: those of KL-Shampoo."""

import math

import jax
import jax.numpy as jnp

from kfac_optax._types import ScalarOrSchedule
from kfac_optax._validate import check_choice, check_legal, resolve
from kfac_optax.linalg.division import positive_or_one
from kfac_optax.methods.gradient.axes import Group
from kfac_optax.methods.gradient.axis_products import along, statistic
from kfac_optax.methods.gradient.phases import ByAxis, Weights

OUTER = "outer"  # Shampoo's own
KL = "kl"
STATISTICS = (OUTER, KL)


def checked_decay(
    where: str,
    statistics: str,
    decay: ScalarOrSchedule,
    root: object = None,
) -> ScalarOrSchedule:
    """The decay of these statistics; of a schedule 1, which sums, makes no sense to those of `"kl"`.

    Raises:
      ValueError: the word is unknown; statistics of `"kl"` are to be sums, or have another root.
    """
    check_choice(where, "statistics", statistics, STATISTICS)
    if statistics != KL:
        return decay
    if root not in (None, 2):
        raise ValueError(
            f"{where}: statistics='kl' with root={root}; expected root=None. Their product is the "
            "second moment, whose inverse square root is that of every axis."
        )
    if callable(decay) or isinstance(decay, jax.Array):

        def below_one(count: jax.Array) -> jax.Array:
            now = jnp.asarray(resolve(decay, count), jnp.float32)
            # what is no number is ignored and counted
            return jnp.where(now < 1, now, jnp.nan)

        return below_one
    check_legal(where, "decay", decay)
    if float(decay) >= 1:
        raise ValueError(
            f"{where}: statistics='kl' with decay={decay}, which sums; expected an average, "
            "decay=0.95 for example."
        )
    return decay


def kl_averaged_in(
    group: Group,
    tensors: jax.Array,
    factors: ByAxis,
    weights: Weights,
    whiteners: ByAxis,
) -> ByAxis:
    """Statistics that minimise `KL(N(0, E[g g^T]) || N(0, H_1 (x) ... (x) H_k))`.

    Twice that divergence is, up to a constant, with `N = n_1 ... n_k` entries,

    `sum_i (N / n_i) log det H_i + E ||G x_1 H_1^(-1/2) ... x_k H_k^(-1/2)||^2`,

    and its derivative by `H_i` vanishes where

    `H_i = (n_i / N) E[S_i]`, `S_i = mat_i(G x_(j != i) H_j^(-1/2)) mat_i(...)^T`,

    so that `H_i <- e H_i + (1 - e) (n_i / N) S_i`. As the whitened gradient, of mean square one on
    average, cannot be larger than `1 / (1 - e)` where the statistics know of it, one that is counts
    so much less: directions that the first gradients lack would take over for hundreds of steps.
    At first, of mean square `s`, all other factors are taken for `s^(1/k) I`.

    Args:
      group: equal tensors.
      tensors: their gradients, `[copies, n_1, ..., n_k]`.
      factors: `H_i` of the axes that have one, `[copies, n_i, n_i]` or diagonals `[copies, n_i]`.
      weights: `e` and `1 - e`.
      whiteners: `W_i` with `W_i^T W_i = H_i^(-1)` as it was, in the shapes of the factors.

    Returns:
      The new factors.
    """
    held, new = weights
    ready = {axis: _begun(w, tensors, len(factors)) for axis, w in whiteners.items()}
    share = _share(tensors, ready, new)
    out = {}
    for axis, old in factors.items():
        others = {name: w for name, w in ready.items() if name != axis}
        i = int(axis)
        # (n_i / N) S_i, of every copy as much as counts
        whitened = _whitened(tensors, others)
        product = statistic(whitened, i, group.kinds[i])
        scale = share * group.block[i] / math.prod(group.block)
        each = scale.reshape(-1, *[1] * (old.ndim - 1))
        out[axis] = held * old + new * each * product
    return out


def _whitened(tensors: jax.Array, whiteners: ByAxis) -> jax.Array:
    for axis, w in whiteners.items():
        tensors = along(tensors, int(axis), w)
    return tensors


def _begun(w: jax.Array, tensors: jax.Array, axes: int) -> jax.Array:
    """The whitener of an axis; of copies that have had no root yet that of `s^(1/k) I`."""
    # of nothing a matrix is the identity that states begin with, a diagonal zero
    if w.ndim == 3:
        identity = jnp.eye(w.shape[-1], dtype=w.dtype)
        empty = (w == 0) | (w == identity)
    else:
        identity = jnp.ones_like(w[:1])
        empty = w == 0
    # one for each copy, with the axes of a whitener
    beside = (-1, *[1] * (w.ndim - 1))
    unknown = jnp.all(empty.reshape(len(w), -1), axis=1)
    # s^(-1/2k), so that all whiteners together divide by the root of s
    inner = tuple(range(1, tensors.ndim))
    size = jnp.mean(jnp.square(tensors), inner)
    power = positive_or_one(size) ** (-1 / (2 * axes))
    start = power.reshape(beside) * identity
    return jnp.where(unknown.reshape(beside), start, w)


def _share(
    tensors: jax.Array,
    whiteners: ByAxis,
    new: jax.Array,
) -> jax.Array:
    """How much of every copy counts, `[copies]`: `min(1, 1 / ((1 - e) mean(whitened^2)))`."""
    if len(whiteners) < 2:  # statistics of one axis are plain averages
        return jnp.ones(len(tensors), tensors.dtype)
    inner = tuple(range(1, tensors.ndim))
    whitened = _whitened(tensors, whiteners)
    size = new * jnp.mean(jnp.square(whitened), inner)
    return jnp.minimum(1 / positive_or_one(size), 1)
