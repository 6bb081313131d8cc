"""K-FAC whose inverses cost less than the cube of a layer's width: from sketches, or followed
online.
"""

from typing import Any

import optax

from kfac_optax._types import Layers
from kfac_optax.blocks.low_rank import low_rank
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
_SET = ("block", "online", "overwrite", "correct_every")


@flat_signature(kfac, low_rank, without=(*_SET, "correct_share"))
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
    return _preset("rs_kfac", layers, rank=rank, **options)


@flat_signature(kfac, low_rank, without=(*_SET, "correct_share"))
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
    return _preset("b_kfac", layers, rank=rank, **options)


@flat_signature(kfac, low_rank, without=(*_SET, "correct_share"))
def b_r_kfac(
    layers: Layers,
    *,
    rank: Rank = 128,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """B-R-KFAC: `b_kfac`, and every `inverse_every` steps a sketch of the dense average overwrites
    the eigenpairs.

    Between two sketches of `rs_kfac` the eigenpairs stay up to date; the dense averages are kept
    for it.

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
    >>> w, x = jnp.zeros((64, 2)), jnp.ones((5, 64))
    >>> tx = b_r_kfac(estimator.layers(w, x), rank=8, learning_rate=1.0)
    >>> state = jax.eval_shape(tx.init, w).preconditioner  # nothing is computed
    >>> print(state.factors["dense_64x2"].inputs.shape, state.inverses["dense_64x2"].inputs.low.vectors.shape)
    (1, 64, 64) (1, 64, 8)

    Reference: Puiu, Brand New K-FACs: Speeding up K-FAC with Online Decomposition Updates (2022).
    """
    return _preset("b_r_kfac", layers, rank=rank, **options)


@flat_signature(kfac, low_rank, without=_SET)
def b_kfac_c(
    layers: Layers,
    *,
    rank: Rank = 128,
    correct_every: int = 5,
    correct_share: float = 0.2,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """B-KFAC-C: `b_kfac`, and now and then some directions, drawn at random, are brought up to date
    with the dense average.

    With `U_c` those columns, `U_c^T X U_c = W L W^T`, `U_c <- U_c W`, `D_c <- L`, in `O(d^2)` for
    each; see `correct_directions`. The dense averages are kept for it.

    Args:
      layers: from `fisher.layers(params, *args)`, traced on a batch of the size that will be used.
      rank: eigenpairs of each factor; or a function of the layer.
      correct_every: statistics between corrections.
      correct_share: share of the directions, one more is added.
      **options: as for `rs_kfac`.

    Returns:
      A transformation, to be chained with the optimizer that takes the step, as `kfac`.

    Raises:
      ValueError: a hyperparameter out of range.

    >>> import jax, jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.fisher(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((64, 2)), jnp.ones((5, 64))
    >>> tx = b_kfac_c(estimator.layers(w, x), rank=8, learning_rate=1.0)
    >>> state = jax.eval_shape(tx.init, w).preconditioner  # nothing is computed
    >>> print(state.factors["dense_64x2"].inputs.shape, state.inverses["dense_64x2"].inputs.low.vectors.shape)
    (1, 64, 64) (1, 64, 8)

    Reference: Puiu, Brand New K-FACs: Speeding up K-FAC with Online Decomposition Updates (2022).
    """
    return _preset(
        "b_kfac_c",
        layers,
        rank=rank,
        correct_every=correct_every,
        correct_share=correct_share,
        **options,
    )


@flat_signature(kfac, low_rank, without=_SET)
def b_r_c(
    layers: Layers,
    *,
    rank: Rank = 128,
    correct_every: int = 5,
    correct_share: float = 0.2,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """`b_r_kfac` and `b_kfac_c` together: corrected between the sketches that overwrite.

    Args:
      layers: from `fisher.layers(params, *args)`, traced on a batch of the size that will be used.
      rank: eigenpairs of each factor; or a function of the layer.
      correct_every: statistics between corrections.
      correct_share: share of the directions, one more is added.
      **options: as for `rs_kfac`.

    Returns:
      A transformation, to be chained with the optimizer that takes the step, as `kfac`.

    Raises:
      ValueError: a hyperparameter out of range.

    >>> import jax, jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.fisher(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((64, 2)), jnp.ones((5, 64))
    >>> tx = b_r_c(estimator.layers(w, x), rank=8, learning_rate=1.0)
    >>> state = jax.eval_shape(tx.init, w).preconditioner  # nothing is computed
    >>> print(state.factors["dense_64x2"].inputs.shape, state.inverses["dense_64x2"].inputs.low.vectors.shape)
    (1, 64, 64) (1, 64, 8)

    Reference: Puiu, Brand New K-FACs: Speeding up K-FAC with Online Decomposition Updates (2022).
    """
    return _preset(
        "b_r_c",
        layers,
        rank=rank,
        correct_every=correct_every,
        correct_share=correct_share,
        **options,
    )


def _preset(
    method: str,
    layers: Layers,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """`kfac` with the blocks of a method; options of one, of the other, or of both."""
    # the same words may be for the blocks, for `kfac`, or for both
    for_blocks = {
        k: options[k] for k in (*_OF_BLOCKS, *_OF_BLOCKS_ALONE, *_OF_BOTH) if k in options
    }
    rest = {k: v for k, v in options.items() if k not in (*_OF_BLOCKS, *_OF_BLOCKS_ALONE)}
    # blocks have seen the word; all that is left is whether layers are left out
    if "normalization" in rest:
        rest["normalization"] = beside_blocks(rest["normalization"])
    return kfac(layers, block=low_rank_blocks(method, **for_blocks), **rest)
