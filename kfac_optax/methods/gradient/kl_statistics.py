"""Statistics of axes whose product is nearest to the second moment: those of KL-Shampoo."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._types import ScalarOrSchedule
from kfac_optax._validate import check_choice, check_legal, resolve
from kfac_optax.linalg.division import positive_or_one
from kfac_optax.methods.gradient.axes import Group, along, statistic
from kfac_optax.methods.gradient.length import no_longer_than, no_longer_than_fresh
from kfac_optax.methods.gradient.phases import ByAxis, Phases, Weights, diagonal_root

OUTER, KL = "outer", "kl"
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
        product = statistic(_whitened(tensors, others), i, group.kinds[i])
        scale = share * group.block[i] / math.prod(group.block)
        out[axis] = held * old + new * scale.reshape(-1, *[1] * (old.ndim - 1)) * product
    return out


def _whitened(tensors: jax.Array, whiteners: ByAxis) -> jax.Array:
    for axis, w in whiteners.items():
        tensors = along(tensors, int(axis), w)
    return tensors


def _begun(w: jax.Array, tensors: jax.Array, axes: int) -> jax.Array:
    """The whitener of an axis; of copies that have had no root yet that of `s^(1/k) I`."""
    inner, ones = tuple(range(1, tensors.ndim)), [1] * (w.ndim - 1)
    # of nothing a matrix is the identity that states begin with, a diagonal zero
    identity = jnp.eye(w.shape[-1], dtype=w.dtype) if w.ndim == 3 else jnp.ones_like(w[:1])
    empty = (w == 0) | (w == identity) if w.ndim == 3 else w == 0
    unknown = jnp.all(empty.reshape(len(w), -1), axis=1).reshape(-1, *ones)
    power = positive_or_one(jnp.mean(jnp.square(tensors), inner)) ** (-1 / (2 * axes))
    return jnp.where(unknown, power.reshape(-1, *ones) * identity, w)


def _share(
    tensors: jax.Array,
    whiteners: ByAxis,
    new: jax.Array,
) -> jax.Array:
    """How much of every copy counts, `[copies]`: `min(1, 1 / ((1 - e) mean(whitened^2)))`."""
    if len(whiteners) < 2:  # statistics of one axis are plain averages
        return jnp.ones(len(tensors), tensors.dtype)
    inner = tuple(range(1, tensors.ndim))
    size = new * jnp.mean(jnp.square(_whitened(tensors, whiteners)), inner)
    return jnp.minimum(1 / positive_or_one(size), 1)


def levelled(factors: ByAxis, inverses: ByAxis) -> tuple[ByAxis, ByAxis]:
    """`c_i H_i` and `c_i^(-1/2) H_i^(-1/2)` of equal mean diagonal entries, `c_1 ... c_k = 1`.

    What is made of them stays as it is: the product alone is determined. Where some `S_i` has a
    lower rank than `H_i` has rows, as of an input that is always zero, one factor would otherwise
    grow and another fall until they leave the range of numbers.

    >>> halves, _ = levelled({"0": jnp.full((1, 2), 8.0), "1": jnp.full((1, 3), 2.0)}, {})
    >>> print(halves["0"].round(3), halves["1"].round(3))
    [[4. 4.]] [[4. 4. 4.]]
    """
    entries = {i: jnp.diagonal(h, 0, 1, 2) if h.ndim == 3 else h for i, h in factors.items()}
    sizes = {i: jnp.mean(x, axis=1) for i, x in entries.items()}
    # roots before products, which would overflow
    middle = math.prod(positive_or_one(size) ** (1 / len(sizes)) for size in sizes.values())
    # of copies with nothing measured there is nothing to bring to one size
    known = math.prod(size > 0 for size in sizes.values())
    by = {i: jnp.where(known, middle / positive_or_one(x), 1) for i, x in sizes.items()}
    new = {i: h * by[i].reshape(-1, *[1] * (h.ndim - 1)) for i, h in factors.items()}
    return new, {i: w / jnp.sqrt(by[i])[:, None, None] for i, w in inverses.items()}


def kl_phases(plain: Phases) -> Phases:
    """Shampoo's phases for roots `H^(-1/2)`, with these statistics."""

    def whiten(
        group: Group,
        step: Any,
        factors: ByAxis,
        inverses: ByAxis,
    ) -> ByAxis:
        """The roots of the step before; those of diagonals are never stale."""
        diagonals = {i: factors[i] for i in factors if i not in inverses}
        ridge = step.value("ridge")
        return {**inverses, **{i: diagonal_root(d, 2, ridge) for i, d in diagonals.items()}}

    def apply(
        group: Group,
        step: Any,
        factors: ByAxis,
        inverses: ByAxis,
        weights: Weights,
    ):
        u = plain.apply(group, step, factors, inverses, weights)
        if len(group.block) == 1:
            return no_longer_than_fresh(group, u, weights[1])
        # as in the statistics: a mean square of 1 / (1 - e) at most
        return no_longer_than(group, u, math.prod(group.block) / weights[1])

    return plain._replace(take_in=kl_averaged_in, apply=apply, whiten=whiten, level=levelled)
