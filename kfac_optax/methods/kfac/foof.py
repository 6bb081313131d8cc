"""FOOF: gradient descent on neurons."""

from typing import Any

import jax
import optax

from kfac_optax._types import Block, Layer, Layers, ScalarOrSchedule
from kfac_optax._validate import check_choice
from kfac_optax.blocks.kronecker.foof import OF, foof_block
from kfac_optax.engine.choice import cover, leave_out
from kfac_optax.engine.core import scale_by_curvature
from kfac_optax.engine.placement import Placement
from kfac_optax.engine.uncovered import WITHOUT_DIAGONAL
from kfac_optax.methods.record import SHORT, Method, Sizes
from kfac_optax.methods.signature import flat_signature


@flat_signature()
def foof(
    layers: Layers,
    *,
    damping: ScalarOrSchedule = 0.1,
    decay: ScalarOrSchedule = 0.95,
    curvature_every: ScalarOrSchedule = 5,
    inverse_every: ScalarOrSchedule = 50,
    stagger: int | None = None,
    uncovered: str = "graft",
    normalization: str = "unitwise",
    sharing: str = "expand",
    positions: int | None = None,
    factored_gradient: bool = False,
    axis_name: Any = None,
    placement: Placement | None = None,
    factor_dtype: Any = None,
    precision: jax.lax.PrecisionLike = "highest",
) -> optax.GradientTransformationExtraArgs:
    """FOOF: `U_i = (A_i + damping I)^{-1} V_i`, K-FAC without its output side.

    Only second moments of the layers' inputs are measured, `A = (1/N) sum_rows a a^T`, so that
    `forward_only` is enough: no labels, no backward pass. Chain it with the optimizer that takes
    the step, `optax.chain(foof(layers), optax.sgd(lr, 0.9))`, and pass
    `curvature=forward_only(predict).at(params, *args)` to every update. The damping is in units of
    `A`, not of the loss; for the same reason there is no KL-clip, which `clip_by_kl(foof(layers),
    learning_rate=lr)` adds.

    Args:
      layers: from `forward_only(predict).layers(params, *args)`, or another estimator's.
      damping: Tikhonov damping.
      decay: bound of the averaging weight `min(1 - 1/k, decay)`.
      curvature_every: period of the statistics.
      inverse_every: period of the inverses.
      stagger: spreads a refresh over this many steps of its period, see `scale_by_curvature`.
      uncovered: parameters without a block: `"graft"` (their gradient with the size of the
        others' updates), `"pass"` (as it is) or `"raise"`; they have no inputs, hence no block
        here.
      normalization: scale and shift of normalisation layers: `"unitwise"` (second moment of
        `(x, 1)` of every channel) or `"pass"`.
      sharing: positions that share a weight: `"expand"` (a row each, added up) or `"reduce"`
        (averaged per example).
      positions: at most about this many positions of an example are measured; `None` for all.
      factored_gradient: precondition gradients of dense layers from their rows, see
        `scale_by_curvature`.
      axis_name: mapped axis of `shard_map`/`pmap`, if any.
      placement: divides refreshes, and the state if it says so, over devices, see `Placement`.
      factor_dtype: dtype of the state, default float32 or the parameters' if wider.
      precision: matmul precision of moments and solves.

    Returns:
      A transformation; its state is made of arrays only.

    Raises:
      ValueError: a hyperparameter out of range, an unknown word.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.forward_only(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((2, 1)), jnp.eye(2)
    >>> tx = foof(estimator.layers(w, x), damping=0.5)
    >>> updates, state = tx.update(jnp.ones((2, 1)), tx.init(w), w, curvature=estimator.at(w, x))
    >>> print(updates.ravel())
    [1. 1.]

    Reference: Benzing, Gradient Descent on Neurons and its Link to Approximate Second-Order
      Optimization (2022).
    """
    check_choice("foof", "uncovered", uncovered, WITHOUT_DIAGONAL)
    check_choice("foof", "normalization", normalization, ("unitwise", "pass"))
    # left out first, so that `uncovered` decides on what is left over
    layers = leave_out(cover(layers, where="foof"), ("masked",), "{kind}: no block of inputs alone")
    # A alone: the factor of outputs is the identity
    linear = foof_block(sharing=sharing, positions=positions, precision=precision)
    # counts of tokens, their sum with a head, (x, 1) of every channel
    others = {kind: foof_block(kind, precision=precision) for kind in OF if kind != "linear"}

    def block_of(layer: Layer) -> Block:
        return others.get(layer.kind, linear)

    # (A_i + damping I)^{-1} V_i, with no bound on the step
    return scale_by_curvature(
        layers,
        block=block_of,
        damping=damping,
        decay=decay,
        curvature_every=curvature_every,
        inverse_every=inverse_every,
        stagger=stagger,
        uncovered=uncovered,
        normalization=normalization,
        factored_gradient=factored_gradient,
        axis_name=axis_name,
        placement=placement,
        factor_dtype=factor_dtype,
    )


def _numbers(sizes: Sizes) -> int:
    # A and its inverse
    return 2 * sizes.p**2


RECORDS = (
    Method(
        name="foof",
        kind="preconditioner",
        summary="K-FAC without its output side; measured by `forward_only`, without labels or a "
        "backward pass",
        paper="Benzing (2022)",
        equation="U = (A + λ I)⁻¹ V",
        needs=frozenset({"gradient", "curvature"}),
        state=_numbers,
        state_text="2 p²",
        cost=("O(p³)", "O(p² q)"),
        test="tests/blocks/test_foof.py::test_it_is_kfac_with_the_identity_for_outputs",
        build=lambda layers, **options: foof(layers, **(SHORT | options)),
        block_of=lambda layer: foof_block(),
    ),
)
