"""Whole optimizers that need gradients alone."""

from typing import Any

import optax

from kfac_optax._types import Numeric, ScalarOrSchedule
from kfac_optax.methods.gradient.eva_s import scale_by_eva_s
from kfac_optax.methods.gradient.shampoo import scale_by_shampoo
from kfac_optax.methods.gradient.soap import scale_by_soap
from kfac_optax.methods.gradient.whole import OF_THE_STEP, entries, matrices, of_leaves, with_step
from kfac_optax.methods.record import Method
from kfac_optax.methods.signature import flat_signature
from kfac_optax.step_rules.kl_clip import clip_by_kl

_SHORT: dict[str, Any] = dict(learning_rate=0.1, inverse_every=3)


@flat_signature(scale_by_shampoo, schedules=OF_THE_STEP)
def shampoo(
    learning_rate: ScalarOrSchedule,
    *,
    momentum: ScalarOrSchedule | None = 0.9,
    weight_decay: ScalarOrSchedule = 0.0,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Shampoo, a whole optimizer: `scale_by_shampoo`, decoupled weight decay, and the step.

    `theta <- theta - learning_rate (M + weight_decay theta)`, with `M` the trace of the
    preconditioned gradients. It needs a parameter tree and gradients, nothing else. With sums of
    statistics (`decay=1`) steps shrink as `1/sqrt(t)`, as those of AdaGrad do; with an average their
    size stays, so a schedule belongs to it. `graft="adam"` takes over a rate tuned for Adam.

    Args:
      learning_rate: number or schedule.
      momentum: of the preconditioned gradients; `None` for none.
      weight_decay: decoupled; `update` needs `params` where it is not the number zero.
      **options: as for `scale_by_shampoo`.

    Returns:
      A transformation whose updates are to be added to the parameters.

    Raises:
      TypeError: a leaf is complex or not floating; a size is no Python integer.
      ValueError: a hyperparameter out of range.

    >>> import jax.numpy as jnp
    >>> tx = shampoo(learning_rate=0.1, ridge=0.0)
    >>> g = jnp.array([[3.0, 0.0], [0.0, -0.5]])
    >>> updates, state = tx.update(g, tx.init(g))
    >>> print(updates.round(3) + 0)
    [[-0.1  0. ]
     [ 0.   0.1]]

    Reference: Gupta, Koren & Singer, Shampoo: Preconditioned Stochastic Tensor Optimization (2018),
      algorithm 2.
    """
    # theta <- theta - rate (U + weight_decay theta)
    preconditioner = scale_by_shampoo(momentum=momentum, **options)
    return with_step("shampoo", preconditioner, learning_rate, weight_decay)


@flat_signature(scale_by_soap, schedules=OF_THE_STEP)
def soap(
    learning_rate: ScalarOrSchedule,
    *,
    weight_decay: ScalarOrSchedule = 0.0,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """SOAP, a whole optimizer: `scale_by_soap`, decoupled weight decay, and the step.

    `theta <- theta - learning_rate (U + weight_decay theta)`, with `U` the update of Adam in
    Shampoo's eigenbasis. It needs a parameter tree and gradients, nothing else; rates are those of
    Adam. The first step only finds the bases.

    Args:
      learning_rate: number or schedule.
      weight_decay: decoupled; `update` needs `params` where it is not the number zero. The paper
        takes 0.01.
      **options: as for `scale_by_soap`.

    Returns:
      A transformation whose updates are to be added to the parameters.

    Raises:
      TypeError: a leaf is complex or not floating; a size is no Python integer.
      ValueError: a hyperparameter out of range.

    >>> import jax.numpy as jnp
    >>> tx = soap(learning_rate=0.1)
    >>> g = jnp.array([[3.0, 0.0], [0.0, -0.5]])
    >>> _, state = tx.update(g, tx.init(g))
    >>> updates, state = tx.update(g, state)
    >>> print(updates.round(3) + 0)
    [[-0.1  0. ]
     [ 0.   0.1]]

    Reference: Vyas et al., SOAP: Improving and Stabilizing Shampoo using Adam (2024), algorithm 3.
    """
    return with_step("soap", scale_by_soap(**options), learning_rate, weight_decay)


@flat_signature(scale_by_eva_s, schedules=(*OF_THE_STEP, "momentum"))
def eva_s(
    learning_rate: ScalarOrSchedule,
    *,
    kl_clip: ScalarOrSchedule | None = 1e-3,
    momentum: Numeric | None = 0.9,
    weight_decay: ScalarOrSchedule = 0.0,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Eva-s, a whole optimizer: `scale_by_eva_s`, KL-clip, decoupled weight decay, momentum, and
    the step.

    `theta <- theta - learning_rate M`, with `M` the trace of `nu U + weight_decay theta`, `U` the
    preconditioned gradient and `nu` the factor of `clip_by_kl`. It needs a parameter tree and
    gradients, nothing else.

    Args:
      learning_rate: number or schedule.
      kl_clip: bound on `learning_rate^2 <U, V>`; `None` for none.
      momentum: of the clipped updates; `None` for none.
      weight_decay: decoupled; `update` needs `params` where it is not the number zero.
      **options: as for `scale_by_eva_s`.

    Returns:
      A transformation whose updates are to be added to the parameters.

    Raises:
      TypeError: a leaf is complex or not floating; a size is no Python integer.
      ValueError: a hyperparameter out of range.

    >>> import jax.numpy as jnp
    >>> tx = eva_s(learning_rate=0.1, damping=1.0, kl_clip=None)
    >>> g = jnp.array([[2.0, 0.0], [0.0, 0.0]])
    >>> updates, state = tx.update(g, tx.init(g))
    >>> print(updates + 0)
    [[-0.1  0. ]
     [ 0.   0. ]]

    Reference: Zhang, Shi & Li, Eva: Practical Second-order Optimization with Kronecker-vectorized
      Approximation (2023).
    """
    # KL-clip takes the rate of the whole optimizer
    clipped = clip_by_kl(scale_by_eva_s(**options), learning_rate=learning_rate, kl_clip=kl_clip)
    return with_step("eva_s", clipped, learning_rate, weight_decay, momentum)


# L, R, their roots and the momentum; of a vector one matrix and its root
# matrices: n^2 for every axis; entries: the leaf itself
_of_shampoo = of_leaves(lambda shape: 2 * matrices(shape) + entries(shape))
# no basis of a vector, which is Adam's
_of_soap = of_leaves(
    lambda shape: (2 * matrices(shape) if len(shape) > 1 else 0) + 2 * entries(shape)
)
# a vector for every axis
_of_eva_s = of_leaves(sum)

RECORDS = (
    Method(
        name="shampoo",
        kind="optimizer",
        summary="every axis of a tensor preconditioned by the root of its second moment",
        paper="Gupta, Koren & Singer (2018); Anil et al. (2020)",
        equation="U = L^(-1/4) G R^(-1/4)",
        needs=frozenset({"gradient"}),
        state=_of_shampoo,
        state_text="2 (p² + q²) + p q; 2 q² + q of a bias",
        cost=("O(d³)", "O(d³)"),
        test="tests/methods/test_shampoo.py::test_dense_kronecker_product_of_roots",
        build=lambda layers, **options: shampoo(**(_SHORT | options)),
        block_of=None,
    ),
    Method(
        name="soap",
        kind="optimizer",
        summary="Adam in the eigenbasis of Shampoo's statistics",
        paper="Vyas et al. (2024)",
        equation="U = Q_L [Q_Lᵀ M Q_R / (√V + ε)] Q_Rᵀ",
        needs=frozenset({"gradient"}),
        state=_of_soap,
        state_text="2 (p² + q²) + 2 p q; 2 q of a bias",
        cost=("O(d³)", "O(d³)"),
        test="tests/methods/test_soap.py::test_dense_reference",
        build=lambda layers, **options: soap(**(_SHORT | options)),
        block_of=None,
    ),
    Method(
        name="eva_s",
        kind="optimizer",
        summary="one mean vector for every axis of a tensor, `c` their product",
        paper="Zhang, Shi & Li (2023)",
        equation="U = (c cᵀ + λ I)⁻¹ G",
        needs=frozenset({"gradient"}),
        state=_of_eva_s,
        state_text="p + q without momentum; q of a bias",
        cost=("nothing", "O(d²)"),
        test="tests/methods/test_eva_s.py::test_product_is_the_dense_inverse",
        build=lambda layers, **options: eva_s(0.1, momentum=None, **options),
        block_of=None,
    ),
)
