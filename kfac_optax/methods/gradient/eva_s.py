"""Eva-s: Shampoo with mean vectors in place of second moments."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from kfac_optax._tree import all_finite, select
from kfac_optax._types import ScalarOrSchedule
from kfac_optax._validate import Checked, check_choice, check_number
from kfac_optax.engine.state import GradientCounts
from kfac_optax.methods.gradient import gate
from kfac_optax.methods.gradient.axes import FULL, IDENTITY, Rules, check_rules
from kfac_optax.methods.gradient.axis_means import (
    against_product,
    averaged,
    between_roots,
    zeros,
)
from kfac_optax.methods.gradient.axiswise import Advanced, Axiswise, Start, Step, transformation

FORMS = ("product", "roots")
_NO_AXIS_IS_LONG = 2**31


class EvaSState(NamedTuple):
    """State of `scale_by_eva_s`. Tensors of equal shape are stacked on axis 0."""

    counts: GradientCounts
    means: Any  # by group and axis: [copies, n]
    given: dict[str, Checked]  # hyperparameters, as far as they made sense


def scale_by_eva_s(
    *,
    damping: ScalarOrSchedule = 0.03,
    decay: ScalarOrSchedule = 0.05,
    form: str = "product",
    merge: int = 1,
    stacked: Callable[[str], int] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gradients preconditioned by one vector for every axis, the mean of the gradient over all
    other axes.

    With `v_i` the averages of these means and `c = v_1 (x) ... (x) v_k`, of a tensor `G`:

    - `form="product"`: `U = (c c^T + damping I)^{-1} G = [G - <G, c> c / (damping + |c|^2)] /
      damping`, one matrix of rank one for the whole tensor, as `eva` has for a layer;
    - `form="roots"`: `U = G x_1 H_1^r ... x_k H_k^r`, `H_i = v_i v_i^T + damping I` and
      `r = -1 / (2 k)`, the exponent of `scale_by_shampoo`. As
      `H^r v = (damping + |v|^2)^r v`, no root has to be computed.

    A vector has one axis, and its mean over no other is the gradient itself. The state is one
    number for every index of every axis. Averages are `v <- e v + (1 - e) v_new`,
    `e = min(1 - 1/t, decay)`, and the gradient of a step is in those of its own step. A gradient
    that is not finite changes nothing, and its update is zero.

    Args:
      damping: Tikhonov damping, positive; in units of the squared gradient of the mean loss.
      decay: bound of the averaging weight.
      form: `"product"` or `"roots"`.
      merge: neighbouring axes are merged, from the left, while their product is at most this and
        two axes are left; 1 merges none.
      stacked: `name -> number` of leading axes that only count equal parameters, as those of
        scanned layers; default none. Names are paths, `"block/kernel"`.

    Returns:
      A transformation whose state is an `EvaSState` of arrays in float32 or wider; updates have the
      dtypes of the gradient.

    Raises:
      TypeError: a leaf is complex or not floating; a size is no Python integer.
      ValueError: a hyperparameter out of range; gradients of other parameters than `init` got.

    >>> tx = scale_by_eva_s(damping=1.0)
    >>> g = jnp.array([[2.0, 0.0], [0.0, 0.0]])
    >>> updates, state = tx.update(g, tx.init(g))
    >>> print(updates)
    [[1. 0.]
     [0. 0.]]

    Reference: Zhang, Shi & Li, Eva: Practical Second-order Optimization with Kronecker-vectorized
      Approximation (2023).
    """
    where = "scale_by_eva_s"
    rules = Rules(_NO_AXIS_IS_LONG, merge, IDENTITY, FULL, stacked)
    check_rules(where, rules, (IDENTITY,), (FULL,))
    check_choice(where, "form", form, FORMS)
    check_number(where, "damping", damping, above=0, schedule=True)
    hyper: dict[str, Any] = dict(damping=damping, decay=decay)
    # (c c^T + damping I)^{-1} G, or roots of (v_i v_i^T + damping I) on every axis
    solve = against_product if form == "product" else between_roots

    def start(begin: Start) -> tuple:
        return ({group.name: zeros(group, begin.dtype) for group in begin.groups},)

    def advance(step: Step, state: Any) -> Advanced:
        number = (step.count + 1).astype(step.dtype)
        # number k enters with weight 1/k while that is more than 1 - decay
        held = jnp.minimum(1 - 1 / number, step.value("decay"))
        new = {}
        for group in step.groups:
            tensors = step.tensors[group.name]
            new[group.name] = averaged(group, tensors, state.means[group.name], held)
        means, skipped = gate.accepted(new, state.means, step.finite)
        out = {}
        for group in step.groups:  # with this gradient in the means
            tensors = step.tensors[group.name]
            out[group.name] = solve(group, tensors, means[group.name], step.value("damping"))
        good = step.finite & all_finite(out)
        # means whose squares overflow would stop every step until they are forgotten
        return Advanced(out, (select(good, means, state.means),), good, skipped)

    return transformation(Axiswise(where, rules, hyper, EvaSState, "means", start, advance))
