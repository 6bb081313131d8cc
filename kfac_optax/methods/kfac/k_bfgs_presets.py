"""K-BFGS and K-BFGS(L): quasi-Newton blocks in place of inverse Kronecker factors."""

from typing import Any

import optax

from kfac_optax._types import Layers, ScalarOrSchedule
from kfac_optax._validate import check_axis_name, check_choice, check_number
from kfac_optax.engine.choice import cover, leave_out
from kfac_optax.methods.kfac.k_bfgs import Rule, scale_by_pairs
from kfac_optax.methods.record import Method, Sizes
from kfac_optax.methods.signature import check_size, flat_signature

UNCOVERED = ("pass", "raise")
# Checked in every update where they are arrays or schedules.
_NUMBERS = ("learning_rate", "damping", "decay")
LEFT_OUT = ("scale_shift", "tied_embedding", "embedding", "masked")


def _preset(
    where: str,
    memory: int | None,
    layers: Layers,
    *,
    learning_rate: ScalarOrSchedule,
    damping: ScalarOrSchedule = 0.3,
    decay: ScalarOrSchedule = 0.9,
    uncovered: str = "pass",
    axis_name: Any = None,
    precision: Any = "highest",
) -> optax.GradientTransformationExtraArgs:
    check_number(where, "learning_rate", learning_rate, at_least=0, schedule=True)
    check_number(where, "damping", damping, above=0, at_most=1, schedule=True)
    check_number(where, "decay", decay, at_least=0, at_most=1, schedule=True)
    check_choice(where, "uncovered", uncovered, UNCOVERED)
    check_axis_name(where, axis_name)
    # left out first, so that `uncovered` decides on what is left over
    layers = leave_out(cover(layers, where=where), LEFT_OUT, "{kind}: no pairs of pre-activations")
    layers = cover(layers, uncovered=uncovered, where=where)
    return scale_by_pairs(
        Rule(where, layers, learning_rate, damping, decay, memory, axis_name, precision)
    )


@flat_signature(_preset, schedules=_NUMBERS)
def k_bfgs(layers: Layers, **options: Any) -> optax.GradientTransformationExtraArgs:
    """K-BFGS: `theta <- theta - learning_rate H_A V H_G`, with both inverse factors of a layer from
    BFGS pairs; nothing is inverted but the first input factor.

    In every step, with the mean input `a`, the mean pre-activation `h = W^T a` and its mean
    gradient `g` of a batch before the step and behind it:

    - `H_G` takes the pair `s = h_behind - h`, `y = g_behind - g`, both averaged over steps and
      damped twice (`double_damped`), so that it stays positive definite and bounded;
    - `H_A` takes `s = H_A a`, `y = (A + sqrt(damping) I) s`, which brings it to the inverse of the
      damped average `A` of `a a^T`.

    The step is part of the method, since a second pass over the batch goes behind it: updates go
    straight into `optax.apply_updates`; what should be added to the gradient (weight decay, a
    moving average) stands in front of it in a chain. Pass
    `curvature=empirical_fisher(per_example_loss).at(params, *args)` to every update, with the loss
    that the gradient is of and everything random in it fixed. A step is left out, and counted in
    `skipped_steps`, where anything before or behind it is not finite.

    Args:
      layers: from `empirical_fisher(...).layers(params, *args)`, or another estimator's.
      **options: some of the words below.

    Words:
      learning_rate: length of the step.
      damping: of both factors, each of which gets its root; in (0, 1].
      decay: bound of the averaging weight `min(1 - 1/k, decay)` of `A`, `s` and `y`.
      uncovered: parameters without a block, among them embeddings, scales and shifts: `"pass"`
        (`-learning_rate` times their gradient) or `"raise"`.
      axis_name: mapped axis of `shard_map`/`pmap`, if any; gradients have to be means over it.
      precision: matmul precision.

    Returns:
      An optimizer; its state is a `KBFGSState` of arrays only.

    Raises:
      ValueError: a number out of range, an unknown word; in an update, no curvature.
      TypeError: in an update, curvature that cannot be taken at other parameters.

    >>> import jax, jax.numpy as jnp, kfac_optax as ko
    >>> loss = lambda w, x: ko.tap_dense(x @ w, x, w)[:, 0] ** 2 / 2
    >>> estimator, w, x = ko.empirical_fisher(loss), jnp.ones((1, 1)), jnp.full((2, 1), 2.0)
    >>> tx, gradient = k_bfgs(estimator.layers(w, x), learning_rate=1.0, damping=1.0), 4 * w
    >>> step = jax.jit(tx.update)
    >>> updates, state = step(gradient, tx.init(w), w, curvature=estimator.at(w, x))
    >>> print(updates.round(3))  # 4 / (A + 1), A = 4; H_G starts as the identity
    [[-0.8]]

    Reference: Goldfarb, Ren & Bahamou, Practical Quasi-Newton Methods for Training Deep Neural
      Networks (2020).
    """
    return _preset("k_bfgs", None, layers, **options)


@flat_signature(_preset, schedules=_NUMBERS)
def k_bfgs_l(
    layers: Layers,
    *,
    memory: int = 100,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """K-BFGS(L): `k_bfgs` with the last `memory` pairs of each layer in place of the matrix `H_G`.

    For wide outputs: `2 memory q` numbers instead of `q^2`. `H_G` starts as the identity and is
    applied by two passes over the pairs.

    Args:
      layers: as for `k_bfgs`.
      memory: pairs.
      **options: as for `k_bfgs`.

    Returns:
      An optimizer; its state is a `KBFGSState` of arrays only.

    Raises:
      TypeError: as of `k_bfgs`; `memory` is no Python integer.
      ValueError: as of `k_bfgs`; `memory < 1`.

    >>> import jax, jax.numpy as jnp, kfac_optax as ko
    >>> loss = lambda w, x: ko.tap_dense(x @ w, x, w)[:, 0] ** 2 / 2
    >>> estimator, w, x = ko.empirical_fisher(loss), jnp.ones((1, 1)), jnp.full((2, 1), 2.0)
    >>> tx, gradient = k_bfgs_l(estimator.layers(w, x), learning_rate=1.0, damping=1.0), 4 * w
    >>> step = jax.jit(tx.update)
    >>> updates, state = step(gradient, tx.init(w), w, curvature=estimator.at(w, x))
    >>> print(updates.round(3))
    [[-0.8]]

    Reference: Goldfarb, Ren & Bahamou, Practical Quasi-Newton Methods for Training Deep Neural
      Networks (2020).
    """
    check_size("k_bfgs_l", "memory", memory)
    return _preset("k_bfgs_l", memory, layers, **options)


def _numbers(sizes: Sizes) -> int:
    """Moments and inverse of the inputs, inverse of the outputs, and the averaged pair."""
    # A, H_A [p, p], H_G [q, q], and (Delta h, Delta g) [q]
    return 2 * sizes.p**2 + sizes.q**2 + 2 * sizes.q


def _numbers_of_pairs(sizes: Sizes) -> int:
    # r pairs and the averaged one, [r + 1, q] each
    return 2 * sizes.p**2 + 2 * (sizes.r + 1) * sizes.q


# a whole optimizer has no default of its rate
_SHORT: dict[str, Any] = dict(learning_rate=0.05)
_COMMON: dict[str, Any] = dict(
    kind="optimizer",
    paper="Goldfarb, Ren & Bahamou (2020)",
    equation="θ ← θ - α H_A V H_G, H_G of pairs (Δh, Δg), H_A of pairs (s, (A + √λ I) s)",
    needs=frozenset({"gradient", "curvature", "losses"}),
    # pairs have a state of their own
    block_of=None,
)

RECORDS = (
    Method(
        name="k_bfgs",
        summary="BFGS on both sides of a layer: of its inputs' second moments, and of how its mean "
        "pre-activations and their gradients change behind a step; data as for `eva`",
        state=_numbers,
        state_text="2 p² + q² + 2 q",
        cost=("nothing", "O(d³), and a second pass"),
        test="tests/methods/test_k_bfgs.py::test_two_steps_are_those_of_the_formulas",
        build=lambda layers, **options: k_bfgs(layers, **(_SHORT | options)),
        **_COMMON,
    ),
    Method(
        name="k_bfgs_l",
        summary="the same with the last `memory=` pairs of the outputs",
        state=_numbers_of_pairs,
        state_text="2 p² + 2 (r + 1) q, r the memory",
        cost=("nothing", "O(d³ + d² r), and a second pass"),
        test="tests/methods/test_k_bfgs.py::test_pairs_are_the_matrix_while_all_are_kept",
        build=lambda layers, **options: k_bfgs_l(layers, **(_SHORT | {"memory": 2} | options)),
        **_COMMON,
    ),
)
