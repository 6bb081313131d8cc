"""K-FAC of low rank followed online, and now and then brought back to the dense averages."""

from typing import Any

import optax

from kfac_optax._types import Layers
from kfac_optax.blocks.low_rank.low_rank import low_rank
from kfac_optax.methods.kfac.fixed import kfac
from kfac_optax.methods.kfac.low_rank_blocks import Rank
from kfac_optax.methods.kfac.low_rank_presets import DECIDED, low_rank_preset
from kfac_optax.methods.signature import flat_signature


@flat_signature(kfac, low_rank, without=(*DECIDED, "correct_share"))
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
    >>> tx = b_r_kfac(estimator.layers(w, x), rank=8, kl_clip=None)
    >>> state = jax.eval_shape(tx.init, w).preconditioner  # nothing is computed
    >>> print(state.factors["dense_64x2"].inputs.shape, state.inverses["dense_64x2"].inputs.low.vectors.shape)
    (1, 64, 64) (1, 64, 8)

    Reference: Puiu, Brand New K-FACs: Speeding up K-FAC with Online Decomposition Updates (2022).
    """
    return low_rank_preset("b_r_kfac", layers, rank=rank, **options)


@flat_signature(kfac, low_rank, without=DECIDED)
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
    >>> tx = b_kfac_c(estimator.layers(w, x), rank=8, kl_clip=None)
    >>> state = jax.eval_shape(tx.init, w).preconditioner  # nothing is computed
    >>> print(state.factors["dense_64x2"].inputs.shape, state.inverses["dense_64x2"].inputs.low.vectors.shape)
    (1, 64, 64) (1, 64, 8)

    Reference: Puiu, Brand New K-FACs: Speeding up K-FAC with Online Decomposition Updates (2022).
    """
    return low_rank_preset(
        "b_kfac_c",
        layers,
        rank=rank,
        correct_every=correct_every,
        correct_share=correct_share,
        **options,
    )


@flat_signature(kfac, low_rank, without=DECIDED)
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
    >>> tx = b_r_c(estimator.layers(w, x), rank=8, kl_clip=None)
    >>> state = jax.eval_shape(tx.init, w).preconditioner  # nothing is computed
    >>> print(state.factors["dense_64x2"].inputs.shape, state.inverses["dense_64x2"].inputs.low.vectors.shape)
    (1, 64, 64) (1, 64, 8)

    Reference: Puiu, Brand New K-FACs: Speeding up K-FAC with Online Decomposition Updates (2022).
    """
    return low_rank_preset(
        "b_r_c",
        layers,
        rank=rank,
        correct_every=correct_every,
        correct_share=correct_share,
        **options,
    )
