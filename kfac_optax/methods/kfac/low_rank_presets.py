"""K-FAC whose inverses cost less than the cube of a layer's width: from sketches, or followed
online.
"""

from typing import Any

import optax

from kfac_optax._types import Layers
from kfac_optax.blocks.low_rank.low_rank import low_rank
from kfac_optax.engine.choice import beside_blocks
from kfac_optax.methods.kfac.fixed import kfac
from kfac_optax.methods.kfac.low_rank_blocks import Rank, low_rank_blocks
from kfac_optax.methods.signature import flat_signature

# words of the blocks that `kfac` does not know
_OF_BLOCKS = (
    "rank",
    "correct_every",
    "correct_share",
    "oversampling",
    "power_iterations",
    "variant",
    "rest",
    "damping_rule",
    "target_error",
    "seed",
)
# words of `kfac` that are of no effect beside blocks that are given
_OF_BLOCKS_ALONE = ("inverse", "convolution", "recurrence", "sharing", "positions")
# words that both need
_OF_BOTH = ("normalization", "precision")
# Words of `low_rank` and `kfac` that the presets decide on themselves.
DECIDED = ("block", "online", "overwrite", "correct_every")


@flat_signature(kfac, low_rank, without=(*DECIDED, "correct_share"))
def rs_kfac(
    layers: Layers,
    *,
    rank: Rank = 128,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Randomised K-FAC: factors are averaged densely, and a refresh takes the leading eigenpairs
    from a random sketch.

    `O(d^2 rank)` for each factor where an eigendecomposition takes `O(d^3)`, and solves in
    `O(rank)` for every entry.

    Args:
      layers: from `fisher.layers(params, *args)`.
      rank: eigenpairs of each factor; or a function of the layer.
      **options: of `kfac` (but `block`), and of `low_rank`: `oversampling`, `power_iterations`,
        `variant`, `rest`, `damping_rule`, `target_error`, `seed`.

    Returns:
      A transformation, to be chained with the optimizer that takes the step, as `kfac`.

    Raises:
      ValueError: a hyperparameter out of range.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((2, 1)), jnp.eye(2)
    >>> tx = rs_kfac(estimator.layers(w, x), rank=1, rest="smallest", learning_rate=1.0, damping=0.25, kl_clip=None)
    >>> updates, state = tx.update(jnp.ones((2, 1)), tx.init(w), w, curvature=estimator.at(w, x))
    >>> [f"{u:.3f}" for u in updates.ravel()]
    ['0.686', '0.686']

    Reference: Puiu, Randomized K-FACs: Speeding up K-FAC with Randomized Numerical Linear Algebra
      (2022), whose damping and left-out eigenvalues are `damping_rule="relative"` and
      `rest="zero"`.
    """
    return low_rank_preset("rs_kfac", layers, rank=rank, **options)


@flat_signature(kfac, low_rank, without=(*DECIDED, "correct_share"))
def b_kfac(
    layers: Layers,
    *,
    rank: Rank = 128,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """B-KFAC: eigenpairs of wide dense layers' factors follow the rows of every statistic, at
    linear cost in the width.

    `(U, D) <- ` the leading pairs of `e U D U^T + (1 - e) Y Y^T`, with `Y` the rows of the batch,
    see `brand_update`; the factors themselves are never formed. Layers that are too small for it,
    and convolutions, are handled as by `rs_kfac`. As updates are cheap, `curvature_every` may be
    small; `inverse_every` concerns those other layers only.

    Args:
      layers: from `fisher.layers(params, *args)`, traced on a batch of the size that will be used.
      rank: eigenpairs of each factor; or a function of the layer.
      **options: as for `rs_kfac`.

    Returns:
      A transformation, to be chained with the optimizer that takes the step, as `kfac`.

    Raises:
      ValueError: a hyperparameter out of range.

    >>> import jax, jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.fisher(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((64, 2)), jax.random.normal(jax.random.key(0), (8, 64))
    >>> tx = b_kfac(estimator.layers(w, x), rank=8, learning_rate=1.0)
    >>> _, state = tx.update(w, tx.init(w), w, curvature=estimator.at(w, x, key=jax.random.key(1)))
    >>> print(f"{ko.diagnostics(state)['captured_energy']:.4f}")
    1.0000

    Reference: Puiu, Brand New K-FACs: Speeding up K-FAC with Online Decomposition Updates (2022),
      whose damping and left-out eigenvalues are `damping_rule="relative"` and `rest="smallest"`.
    """
    return low_rank_preset("b_kfac", layers, rank=rank, **options)


def low_rank_preset(
    method: str,
    layers: Layers,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """`kfac` with the blocks of a method; options of one, of the other, or of both."""
    # the same words may be for the blocks, for `kfac`, or for both
    taken = (*_OF_BLOCKS, *_OF_BLOCKS_ALONE)
    for_blocks = {k: options[k] for k in (*taken, *_OF_BOTH) if k in options}
    rest = {k: v for k, v in options.items() if k not in taken}
    # blocks have seen the word; all that is left is whether layers are left out
    if "normalization" in rest:
        rest["normalization"] = beside_blocks(rest["normalization"])
    blocks = low_rank_blocks(method, **for_blocks)
    return kfac(layers, block=blocks, **rest)
