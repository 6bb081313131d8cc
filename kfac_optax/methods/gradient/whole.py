"""What makes a whole optimizer of a preconditioner of gradients."""

import math
from collections.abc import Callable

import optax

from kfac_optax._types import Numeric, ScalarOrSchedule
from kfac_optax._validate import check_legal
from kfac_optax.methods.record import Sizes


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
    parts = [preconditioner]
    if not isinstance(weight_decay, (int, float)) or weight_decay != 0:
        parts.append(optax.add_decayed_weights(weight_decay))
    if momentum is not None:
        if callable(momentum):
            raise TypeError(f"{where}: momentum is a schedule; expected a number, or None.")
        check_legal(where, "momentum", momentum)
        parts.append(optax.trace(momentum))
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))


def of_leaves(numbers: Callable[[tuple[int, ...]], int]) -> Callable[[Sizes], int]:
    """The state of a dense layer for a record, from that of a leaf by its shape: the kernel, and
    the bias if there is one.
    """

    def state(sizes: Sizes) -> int:
        kernel = numbers((sizes.p - sizes.bias, sizes.q))
        return kernel + (numbers((sizes.q,)) if sizes.bias else 0)

    return state


def matrices(shape: tuple[int, ...]) -> int:
    """Entries of one square matrix for every axis."""
    return sum(n * n for n in shape)


def entries(shape: tuple[int, ...]) -> int:
    """Entries of the leaf itself."""
    return math.prod(shape)
