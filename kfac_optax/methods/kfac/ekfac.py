"""Eigenvalue-corrected K-FAC as a preset."""

from typing import Any

import optax

from kfac_optax._types import Block, Coupling, Layer, Layers, ScalarOrSchedule
from kfac_optax.blocks.ekfac import ekfac_block
from kfac_optax.blocks.kronecker import kronecker
from kfac_optax.engine.choice import BlockOf, blocks_of
from kfac_optax.methods.kfac.fixed import kfac


def ekfac(
    layers: Layers,
    *,
    learning_rate: ScalarOrSchedule | None = None,
    damping: ScalarOrSchedule = 1e-3,
    kl_clip: ScalarOrSchedule | None = 1e-3,
    bound: str = "damped",
    momentum: float = 0.9,
    decay: ScalarOrSchedule = 0.95,
    curvature_every: ScalarOrSchedule = 10,
    inverse_every: ScalarOrSchedule = 100,
    stagger: int | None = None,
    uncovered: str = "pass",
    normalization: str = "unitwise",
    axis_name: Any = None,
    factor_dtype: Any = None,
    precision: Any = "highest",
    coupling: Coupling | None = None,
    balance: str = "sum",
) -> optax.GradientTransformationExtraArgs:
    """EKFAC: K-FAC with the true second moments of the gradient in its eigenbasis.

    `U = U_A [(U_A^T V U_G) / (S + damping)] U_G^T` per layer, with `S` the mean over examples of
    the squared gradient in the eigenbasis of `A (x) G`, see `ekfac_block`. The basis is that of the
    last refresh, every `inverse_every` steps; `S` follows with every statistic, at the cost of
    matmuls only, so statistics may be more frequent than with `kfac`, and have to be more frequent
    than refreshes. A layer without rows of examples (see the coverage table) gets the block of
    `kfac`, as do embeddings and normalisation layers.

    Args:
      layers: from `fisher.layers(params, *args)`.
      learning_rate: KL-clip's rate, as for `kfac`.
      damping: Tikhonov damping, exact.
      kl_clip: bound on the squared Fisher norm of a step; `None` for none.
      bound: `"damped"` (KL-clip) or `"exact"`, as for `kfac`.
      momentum: of the transformation that follows; `bound="exact"` counts it.
      decay: bound of the averaging weights of factors and moments.
      curvature_every: period of the statistics, moments among them.
      inverse_every: period of the eigenbases.
      stagger: spreads a refresh over this many steps of its period, see `scale_by_curvature`.
      uncovered: parameters without a block: `"pass"`, `"graft"`, `"diagonal"` or `"raise"`, as for
        `kfac`.
      normalization: scale and shift of normalisation layers: `"unitwise"`, `"diagonal"` or
        `"pass"`.
      axis_name: mapped axis of `shard_map`/`pmap`, if any.
      factor_dtype: dtype of the state, default float32 or the parameters' if wider.
      precision: matmul precision of factor products, moments and solves.
      coupling: what layers tell each other: `coarse_correction()` or `deflated()`.
      balance: of a coupling, as for `kfac`.

    Returns:
      A transformation, to be chained with the optimizer that takes the step, as `kfac`.

    Raises:
      ValueError: a hyperparameter out of range, or KL-clip without a rate.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((2, 1)), jnp.eye(2)
    >>> tx = ekfac(estimator.layers(w, x), learning_rate=1.0, damping=0.5, kl_clip=None)
    >>> updates, state = tx.update(jnp.ones((2, 1)), tx.init(w), w, curvature=estimator.at(w, x))
    >>> print(updates.ravel())
    [1. 1.]

    Reference: George, Laurent, Bouthillier, Ballas & Vincent, Fast Approximate Natural Gradient
      Descent in a Kronecker-factored Eigenbasis (2018).
    """
    return kfac(
        layers,
        learning_rate=learning_rate,
        damping=damping,
        kl_clip=kl_clip,
        bound=bound,
        momentum=momentum,
        decay=decay,
        curvature_every=curvature_every,
        inverse_every=inverse_every,
        stagger=stagger,
        uncovered=uncovered,
        normalization=normalization,
        axis_name=axis_name,
        factor_dtype=factor_dtype,
        precision=precision,
        block=_corrected_blocks(normalization, precision),
        coupling=coupling,
        balance=balance,
    )


def _corrected_blocks(normalization: str, precision: Any) -> BlockOf:
    """`ekfac_block` for layers whose gradient is known for every example; else what `kfac` takes."""
    corrected, plain = ekfac_block(precision=precision), kronecker(precision=precision)
    blocks = blocks_of(corrected, normalization=normalization, precision=precision)

    def block_of(layer: Layer) -> Block:
        block = blocks(layer)
        return plain if block is corrected and not layer.per_example else block

    return block_of
