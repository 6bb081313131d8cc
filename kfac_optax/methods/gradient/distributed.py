"""Distributed Shampoo: averages, Newton's iteration, grafted norms, and two momenta."""

from collections.abc import Callable
from typing import Any

import optax

from kfac_optax._types import ScalarOrSchedule
from kfac_optax._validate import check_choice
from kfac_optax.linalg.roots import METHODS
from kfac_optax.methods.gradient.axes import DIAGONAL, FULL, Rules, check_rules
from kfac_optax.methods.gradient.kl_statistics import OUTER, checked_decay
from kfac_optax.methods.gradient.momenta import graft_of, two_momenta
from kfac_optax.methods.gradient.phases import by_phases
from kfac_optax.methods.gradient.shampoo import ShampooState, phases_of
from kfac_optax.methods.gradient.shampoo_phases import check_root
from kfac_optax.methods.gradient.whole import OF_THE_STEP, entries, matrices, of_leaves, with_step
from kfac_optax.methods.record import Method
from kfac_optax.methods.signature import flat_signature


def scale_by_distributed_shampoo(
    *,
    momentum: ScalarOrSchedule = 0.9,
    decay: ScalarOrSchedule = 0.999,
    ridge: ScalarOrSchedule = 1e-6,
    start_step: ScalarOrSchedule = 5,
    curvature_every: ScalarOrSchedule = 1,
    inverse_every: ScalarOrSchedule = 10,
    nesterov: bool = True,
    graft: str | optax.GradientTransformation | None = "sgd",
    root: int | None = None,
    statistics: str = OUTER,
    inverse: str = "newton",
    max_dim: int = 1024,
    merge: int = 1024,
    long_axes: str = "split",
    vectors: str = "full",
    stacked: Callable[[str], int] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_shampoo` as it runs at scale: its steps get the norms of another optimizer's, and
    both have a momentum.

    With `S` the gradient between the roots of its axes and `Q` the update of `graft`, leaf by leaf:

    `S <- S ||Q|| / ||S||`, `M_S <- momentum M_S + S`, `M_Q <- momentum M_Q + Q`.

    The update is `M_Q` in the first `start_step` steps and `M_S` from then on; with `nesterov`
    `momentum M + (.)` of the same. Roots are found by the coupled Newton iteration, a root that
    does not converge keeps the old one. Axes are merged and split as in `scale_by_shampoo`, whose
    other words these are. With `decay=1`, no graft, no momentum and `start_step=0` it is
    `scale_by_shampoo`.

    Args:
      momentum: of both traces.
      decay: bound of the averaging weight of the statistics; 1 sums them.
      ridge: added to every statistic before its root, relative to its largest eigenvalue.
      start_step: the number of steps that the grafted optimizer makes alone.
      curvature_every: period of the statistics, in steps.
      inverse_every: period of the roots, in steps.
      nesterov: look ahead by one momentum.
      graft: `"sgd"`, `"adam"`, `"rms"`, `"adagrad"`, `"sign"`, one of these with `_normalized`
        (of every leaf divided by its norm), a transformation, or `None`: norms stay and the first
        steps are those of the gradient.
      root: `p` of `H^(-1/p)`; default twice the number of axes.
      statistics: `"outer"` or `"kl"`, as in `scale_by_shampoo`; for `"kl"` lower the decay, too.
      inverse: `"newton"` or `"eigh"`.
      max_dim: axes longer than this are long, the size of a block.
      merge: neighbouring axes are merged while their product is at most this and two are left.
      long_axes: `"split"` or `"diagonal"`.
      vectors: `"full"` or `"diagonal"`.
      stacked: `name -> number` of leading axes that only count equal parameters.

    Returns:
      A transformation with a `ShampooState` whose `trace` holds both momenta.

    Raises:
      TypeError: a leaf is complex or not floating; a size is no Python integer.
      ValueError: a hyperparameter out of range; gradients of other parameters than `init` got.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_distributed_shampoo(start_step=0, nesterov=False, ridge=0.0)
    >>> g = jnp.array([[3.0, 0.0], [0.0, -4.0]])
    >>> updates, state = tx.update(g, tx.init(g))
    >>> print(updates.round(2) + 0)  # the polar factor with the norm of the gradient
    [[ 3.54  0.  ]
     [ 0.   -3.54]]

    Reference: Anil, Gupta, Koren, Regan & Singer, Scalable Second Order Optimization for Deep
      Learning (2020).
    """
    where = "scale_by_distributed_shampoo"
    rules = Rules(max_dim, merge, long_axes, vectors, stacked)
    check_rules(where, rules, ("split", DIAGONAL), (FULL, DIAGONAL))
    check_choice(where, "inverse", inverse, METHODS)
    check_root(where, root)
    decay = checked_decay(where, statistics, decay, root)
    hyper: dict[str, Any] = dict(momentum=momentum, decay=decay, ridge=ridge, start_step=start_step)
    hyper |= dict(curvature_every=curvature_every, inverse_every=inverse_every)
    # of the preconditioned gradient and of the grafted one
    finish = two_momenta(graft_of(where, graft), nesterov=nesterov)
    # H_i <- e H_i + (1 - e) mat_i(G) mat_i(G)^T, H_i^(-1/p), then the finish
    phases = phases_of(statistics, root, inverse)
    return by_phases(where, rules, hyper, phases, finish, state=ShampooState)


@flat_signature(scale_by_distributed_shampoo, schedules=OF_THE_STEP)
def distributed_shampoo(
    learning_rate: ScalarOrSchedule,
    *,
    weight_decay: ScalarOrSchedule = 0.0,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Distributed Shampoo, a whole optimizer: `scale_by_distributed_shampoo`, decoupled weight
    decay, and the step. Rates are those of the grafted optimizer, SGD with momentum by default.

    `theta <- theta - learning_rate (M + weight_decay theta)`. Averages of statistics, blocks, roots
    that are refreshed now and then and grafted norms are what made Shampoo usable on large models.

    Args:
      learning_rate: number or schedule.
      weight_decay: decoupled; `update` needs `params` where it is not the number zero.
      **options: as for `scale_by_distributed_shampoo`.

    Returns:
      A transformation whose updates are to be added to the parameters.

    Raises:
      TypeError: a leaf is complex or not floating; a size is no Python integer.
      ValueError: a hyperparameter out of range.

    >>> import jax.numpy as jnp
    >>> tx = distributed_shampoo(learning_rate=0.1, start_step=0, nesterov=False, ridge=0.0)
    >>> g = jnp.array([[3.0, 0.0], [0.0, -4.0]])
    >>> updates, state = tx.update(g, tx.init(g))
    >>> print(updates.round(3) + 0)
    [[-0.354  0.   ]
     [ 0.     0.354]]

    Reference: Anil, Gupta, Koren, Regan & Singer, Scalable Second Order Optimization for Deep
      Learning (2020).
    """
    preconditioner = scale_by_distributed_shampoo(**options)
    return with_step("distributed_shampoo", preconditioner, learning_rate, weight_decay)


# L, R, their roots and two momenta
_numbers = of_leaves(lambda shape: 2 * matrices(shape) + 2 * entries(shape))

RECORDS = (
    Method(
        name="distributed_shampoo",
        kind="optimizer",
        summary="Shampoo of averages, with norms grafted on each leaf and two momenta",
        paper="Anil, Gupta, Koren, Regan & Singer (2020)",
        equation="U = S ‖Q‖ / ‖S‖, S = L^(-1/4) G R^(-1/4)",
        needs=frozenset({"gradient"}),
        state=_numbers,
        state_text="2 (p² + q²) + 2 p q; 2 q² + 2 q of a bias",
        cost=("O(d³)", "O(d³)"),
        test="tests/methods/test_distributed_shampoo.py::test_two_momenta_written_out",
        build=lambda layers, **options: distributed_shampoo(
            **(dict(learning_rate=0.1, inverse_every=3, start_step=1) | options)
        ),
        block_of=None,
    ),
)
