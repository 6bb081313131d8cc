"""The exact natural gradient of deep linear networks: K-FAC, shared out among the layers."""

from typing import Any

import optax

from kfac_optax._types import Layers, ScalarOrSchedule
from kfac_optax.blocks.kronecker.kronecker import kronecker
from kfac_optax.engine.choice import check_coupled
from kfac_optax.methods.kfac.fixed import eigen_numbers, kfac
from kfac_optax.methods.record import SHORT, Method
from kfac_optax.methods.signature import flat_signature


@flat_signature(
    kfac, without=("kl_clip", "bound", "balance", "coupling", "learning_rate", "momentum")
)
def linear_natural(
    layers: Layers,
    *,
    damping: ScalarOrSchedule = 1e-2,
    curvature_every: ScalarOrSchedule = 1,
    inverse_every: ScalarOrSchedule = 1,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """K-FAC divided by the number of layers: `U_l = (1/L) (A_l (x) G_l + damping I)^{-1} V_l`.

    In a chain of `L` linear layers every layer alone could bring the whole change of the function
    that the natural gradient asks for, so all of them together bring `L` times as much. The `L`-th
    part of each is an exact natural gradient step: of a least-squares loss the residual shrinks by
    `1 - learning_rate`, whatever the depth, and `log(loss)` falls with the slope -2 in time. With
    activations in between it is a rule of thumb for the rate, the one of very wide networks too.

    Pass `curvature=ggn(predict).at(params, *args)` to every update; drawn labels would make the
    statement true on average only. Parameters without a block are divided too.

    Args:
      layers: from `ggn(predict).layers(params, *args)`.
      damping: as for `kfac`. The statement above is one about small damping, `1e-6` say, and least
        squares over a whole batch. A softmax or logistic head asks for a change of its logits by
        `1/p`, `p` the probability of a label, and its curvature vanishes as `p (1 - p)` does: where
        `A (x) G` is next to nothing, so little damping makes steps that leave the region in which
        the model is linear, and the loss jumps. The default keeps them in it.
      curvature_every: period of the statistics; the statement is about those of every step.
      inverse_every: period of the inverses.
      **options: as for `kfac`.

    Returns:
      A transformation, to be chained with the optimizer that takes the step, as `kfac`.

    Raises:
      ValueError: a hyperparameter out of range; no layer with weights between units.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(x @ w["a"] @ w["b"]))
    >>> w, x = {"a": jnp.ones((1, 1)), "b": jnp.ones((1, 1))}, jnp.ones((2, 1))
    >>> tx = linear_natural(estimator.layers(w, x), damping=1e-6)
    >>> updates, state = tx.update(w, tx.init(w), w, curvature=estimator.at(w, x))
    >>> print(updates["a"].round(3), updates["b"].round(3))
    [[0.5]] [[0.5]]

    Reference: Bernacchia, Lengyel & Hennequin, Exact natural gradient in deep linear networks and
      its application to the nonlinear case (2018).
    """
    check_coupled(layers, "linear_natural")
    # L counts layers with weights between units, every one of a stack
    share = 1 / sum(layer.copies for layer in layers if layer.coupled)
    options |= dict(curvature_every=curvature_every, inverse_every=inverse_every)
    # U_l = (1/L) (A_l (x) G_l + damping I)^{-1} V_l
    natural = kfac(layers, damping=damping, kl_clip=None, **options)
    return optax.chain(natural, optax.scale(share))


RECORDS = (
    Method(
        name="linear_natural",
        kind="preconditioner",
        summary="K-FAC divided by the number of layers: the exact natural gradient of deep linear "
        "networks",
        paper="Bernacchia, Lengyel & Hennequin (2018)",
        equation="U = (A ⊗ G + λ I)⁻¹ V / L",
        needs=frozenset({"gradient", "curvature"}),
        state=eigen_numbers,
        state_text="2 (p² + q²) + p + q",
        cost=("O(d³)", "O(d³)"),
        test="tests/methods/test_linear_natural.py::test_it_moves_the_function_as_the_natural_gradient",
        build=lambda layers, **options: linear_natural(
            layers, **(SHORT | {"damping": 1e-3} | options)
        ),
        block_of=lambda layer: kronecker(),
    ),
)
