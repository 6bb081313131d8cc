"""What makes a whole optimizer of a preconditioner of gradients."""

import math
from collections.abc import Callable
from typing import Any

import jax
import optax

from kfac_optax._types import Numeric, PyTree, ScalarOrSchedule
from kfac_optax._validate import check_legal
from kfac_optax.methods.record import Sizes

# numbers of the step that may be schedules; the transformations of Optax check none of them
OF_THE_STEP = ("learning_rate", "weight_decay")


def with_step(
    where: str,
    preconditioner: optax.GradientTransformation,
    learning_rate: ScalarOrSchedule,
    weight_decay: ScalarOrSchedule,
    momentum: Numeric | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The preconditioner, decoupled weight decay and momentum if there are any, and the rate."""
    check_legal(where, "learning_rate", learning_rate)
    check_legal(where, "weight_decay", weight_decay)
    # U, then w theta, then momentum, then the rate
    parts = [preconditioner]
    # an array may be anything by the time a step runs
    if not isinstance(weight_decay, (int, float)) or weight_decay != 0:
        parts.append(optax.add_decayed_weights(weight_decay))
    if momentum is not None:
        # optax.trace takes a number
        check_legal(where, "momentum", momentum, schedule=False)
        parts.append(optax.trace(momentum))
    return _of_their_dtype(optax.chain(*parts, optax.scale_by_learning_rate(learning_rate)))


def _of_their_dtype(
    tx: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Updates in the dtypes of the gradient, also where a rate is an array of a wider one."""

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree | None = None,
        **extra: Any,
    ):
        new, state = tx.update(updates, state, params, **extra)
        return jax.tree.map(lambda u, g: u.astype(g.dtype), new, updates), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def of_leaves(numbers: Callable[[tuple[int, ...]], int]) -> Callable[[Sizes], int]:
    """The state of a dense layer for a record, from that of a leaf by its shape: the kernel, and
    the bias if there is one.
    """

    def state(sizes: Sizes) -> int:
        # [p, q] without the row of the bias, which is a leaf of its own
        kernel = numbers((sizes.p - sizes.bias, sizes.q))
        return kernel + (numbers((sizes.q,)) if sizes.bias else 0)

    return state


def matrices(shape: tuple[int, ...]) -> int:
    """Entries of one square matrix for every axis."""
    return sum(n * n for n in shape)


def entries(shape: tuple[int, ...]) -> int:
    """Entries of the leaf itself."""
    return math.prod(shape)
