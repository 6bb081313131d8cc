"""M-FAC: the inverse empirical Fisher of a window of gradients, without a matrix of its size."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from kfac_optax._tree import all_finite
from kfac_optax._types import PyTree, ScalarOrSchedule
from kfac_optax._validate import check_number
from kfac_optax.linalg.factorize import shift_for
from kfac_optax.linalg.smw import KernelInverse, factor_kernel, kernel_solve, solve_in_parameters
from kfac_optax.methods.gradient.treewise import Made, Rule, Step, transformation
from kfac_optax.methods.gradient.window import (
    Window,
    ages,
    check_length,
    combine,
    empty_window,
    put,
    stacked_rows,
)
from kfac_optax.methods.record import Method
from kfac_optax.methods.signature import check_size, flat_signature


@flat_signature()
def mfac(
    *,
    window: int = 1024,
    damping: ScalarOrSchedule = 1e-5,
) -> optax.GradientTransformationExtraArgs:
    """M-FAC: the damped empirical Fisher of the last `m` gradients, inverted exactly.

    `U = (F + damping I)^{-1} V` with `F = (1/n) G^T G`, `G [n, d]` the last gradients, this one
    among them, `n` the window or as many as there have been. It is solved by the Cholesky factor of
    the matrix of their products, `U = G^T (G G^T / n + damping I)^{-1} e`, as the gradient is row
    `e` itself. The step costs `O(m d + m^3)` with `m` the window, and `m` gradients are kept. Chain
    it with the optimizer that takes the step; weight decay belongs before it.

    `update(grads, state, params, *, per_example_grads=None)`: a tree like the gradient whose leaves
    have an axis of examples in front. Its gradients are then the new rows, in place of that of the
    batch, and the gradient may be anything:
    `U = (V - G^T (G G^T + n damping I)^{-1} G V) / damping`, refined once.

    Args:
      window: `m`. One that is longer than the training adds up gradients of all of it.
      damping: positive, in units of the gradients' squares. It counts as rounding of the trace of
        `F` at least.

    Returns:
      A transformation; its state has `m d + m^2` numbers.

    Raises:
      TypeError: a leaf is complex or not floating.
      ValueError: a hyperparameter out of range; gradients of other parameters than `init` got, or
        more examples than rows.

    >>> tx = mfac(window=2, damping=2.0)
    >>> g = jnp.array([2.0, 0.0])
    >>> updates, state = tx.update(g, tx.init(g))
    >>> print(updates.round(3))  # g / (|g|^2 + 2)
    [0.333 0.   ]

    Reference: Frantar, Kurtic & Alistarh, M-FAC: Efficient Matrix-Free Approximations of
      Second-Order Information (2021), the dynamic algorithm. There `n` is `m` from the start, which
      makes the first steps up to `m` times as long.
    """
    check_size("mfac", "window", window)
    check_number("mfac", "damping", damping, above=0, schedule=True)

    def step(given: Step) -> Made:
        vector = given.gradient
        check_length("mfac", given.held, vector)
        examples = given.extra.get("per_example_grads")
        if examples is None:
            held, fits = put(given.held, vector[None], given.finite)
            newest = (ages(held)[0] == 0).astype(vector.dtype)
            weights = kernel_solve(_factored(held, given.now["damping"]), newest)
            direction = combine(held, weights)
        else:
            new = _example_rows(given, examples, window)
            held, fits = put(given.held, new, given.finite & all_finite(new))
            direction = _solved(held, given.now["damping"], vector)
        return Made(direction, held, fits, given.finite & ~fits)

    return transformation(
        Rule(
            "mfac",
            dict(damping=damping),
            lambda params, dtype: empty_window(window, params, dtype),
            step,
            guarded=False,
            flat=True,
        )
    )


def _factored(window: Window, damping: jax.Array) -> KernelInverse:
    """`(G G^T / n + damping I)^{-1}`."""
    kernel = window.gram / _gradients(window)
    return factor_kernel(kernel, shift_for(damping, jnp.trace(kernel)))


def _gradients(window: Window) -> jax.Array:
    """How many of the rows are gradients, at least one."""
    _, used = ages(window)
    return jnp.maximum(jnp.sum(used), 1).astype(window.gram.dtype)


def _solved(
    window: Window,
    damping: jax.Array,
    vector: jax.Array,
) -> jax.Array:
    """`(G^T G / n + damping I)^{-1} v` for any `v`, by Woodbury's formula."""
    root = jnp.sqrt(_gradients(window))

    def forward(v: jax.Array) -> jax.Array:
        return jnp.matmul(window.rows, v, precision="highest") / root

    def adjoint(u: jax.Array) -> jax.Array:
        return combine(window, u) / root

    return solve_in_parameters(_factored(window, damping), forward, adjoint, vector, refine=1)


def _example_rows(
    given: Step,
    examples: PyTree,
    window: int,
) -> jax.Array:
    """Gradients of examples as rows `[B, d]`.

    Raises:
      ValueError: they are no tree like the gradient, or more than the window has rows.
    """
    rows = stacked_rows("mfac", given.updates, examples, given.gradient.dtype)
    if len(rows) > window:
        raise ValueError(
            f"mfac.update: got the gradients of {len(rows)} examples for a window of {window} rows; "
            "expected at most as many. Pass a part of them, or raise `window`."
        )
    return rows


_SHORT: dict[str, Any] = dict(window=2, damping=0.05)

RECORDS = (
    Method(
        name="mfac",
        kind="preconditioner",
        summary="the damped empirical Fisher of the last m gradients, all parameters together, "
        "inverted through the matrix of their products; gradients alone",
        paper="Frantar, Kurtic & Alistarh (2021)",
        equation="U = (Gᵀ G / n + λ I)⁻¹ V, G the last n ≤ m gradients",
        needs=frozenset({"gradient"}),
        state=lambda sizes: sizes.r * sizes.p * sizes.q,
        state_text="m p q (and m² once)",
        cost=("nothing", "O(m D + m³) for D parameters"),
        test="tests/methods/test_windows.py::test_mfac_is_the_dense_inverse",
        build=lambda layers, **options: mfac(**(_SHORT | options)),
        block_of=None,
        across=lambda layers: 4,
    ),
)
