"""GGT: full-matrix AdaGrad over a window of gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from kfac_optax._types import ScalarOrSchedule
from kfac_optax._validate import check_choice, check_number
from kfac_optax.linalg.division import positive_or_one
from kfac_optax.linalg.factorize import psd_eigh
from kfac_optax.methods.gradient.treewise import Made, Rule, Step, transformation
from kfac_optax.methods.gradient.window import (
    Window,
    ages,
    check_length,
    combine,
    empty_window,
    put,
)
from kfac_optax.methods.record import Method
from kfac_optax.methods.signature import check_size, flat_signature

MODES = ("full", "pinv")


@flat_signature()
def ggt(
    *,
    window: int = 100,
    eps: ScalarOrSchedule = 1e-4,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 1.0,
    mode: str = "full",
) -> optax.GradientTransformationExtraArgs:
    """GGT: the gradient divided by the root of the second moment of the last gradients, a full
    matrix over all parameters.

    With `G [d, m]` the last `m` gradients, that of age `j` scaled by `b2^(j/2)`, and `v` their mean
    with weights `b1^j` on these columns:

    - `mode="full"`: `U = [(G G^T)^{1/2} + eps I]^{-1} v`;
    - `mode="pinv"`: `U = [(G G^T)^{1/2}]^+ v`, without directions whose singular value is at most
      `eps`.

    Both are combinations of the columns: with `G^T G = V diag(s^2) V^T` and `v = G x`,
    `U = G V f(s) V^T x`, `f(s) = 1 / (s + eps)` or `1 / s`, so nothing is divided by `eps` where
    there is no gradient. Singular values count as rounding of the largest at least. The step costs
    `O(m d + m^3)`, and `m` gradients are kept. Sums shrink steps as AdaGrad does, `b2 < 1` does
    not. Chain it with what takes the step, `optax.chain(ggt(), optax.scale_by_learning_rate(lr))`.

    Args:
      window: `m`.
      eps: positive; in units of the norm of a gradient.
      b1: momentum; 0 for the gradient of the step alone.
      b2: decay of the window; 1 for none.
      mode: `"full"` or `"pinv"`.

    Returns:
      A transformation; its state has `m d + m^2` numbers.

    Raises:
      TypeError: a leaf is complex or not floating.
      ValueError: a hyperparameter out of range; gradients of other parameters than `init` got.

    >>> tx = ggt(window=2, eps=1.0, b1=0.0)
    >>> g = jnp.array([3.0, 0.0])
    >>> updates, state = tx.update(g, tx.init(g))
    >>> print(updates)
    [0.75 0.  ]

    Reference: Agarwal et al., Efficient Full-Matrix Adaptive Regularization (2018), for the window
      and the small eigenproblem.
    """
    check_size("ggt", "window", window)
    check_choice("ggt", "mode", mode, MODES)
    check_number("ggt", "eps", eps, above=0, schedule=True)

    def step(given: Step) -> Made:
        check_length("ggt", given.held, given.gradient)
        held, fits = put(given.held, given.gradient[None], given.finite)
        direction = combine(held, _weights(held, given.now, mode))
        return Made(direction, held, fits, given.finite & ~fits)

    return transformation(
        Rule(
            "ggt",
            dict(eps=eps, b1=b1, b2=b2),
            lambda params, dtype: empty_window(window, params, dtype),
            step,
            guarded=False,
            flat=True,
        )
    )


def _weights(
    window: Window,
    now: dict[str, jax.Array],
    mode: str,
) -> jax.Array:
    """`D V f(s) V^T x`: the update as a combination of the rows, `D` their scales."""
    age, used = ages(window)
    x = jnp.where(used, now["b1"] ** age, 0)
    x = x / jnp.maximum(jnp.sum(x), 1)
    scale = now["b2"] ** (age / 2).astype(x.dtype)
    vectors, squares = psd_eigh(scale[:, None] * window.gram * scale)
    # an eigenvalue below rounding of the largest says nothing about its direction
    rounding = len(x) * jnp.finfo(x.dtype).eps
    s = jnp.sqrt(jnp.maximum(squares, rounding * squares[-1]))
    kept = jnp.where(s > now["eps"], 1 / positive_or_one(s), 0)
    f = kept if mode == "pinv" else 1 / (s + now["eps"])
    with jax.default_matmul_precision("highest"):
        return scale * (vectors @ (f * (x @ vectors)))


_SHORT: dict[str, Any] = dict(window=2)

RECORDS = (
    Method(
        name="ggt",
        kind="preconditioner",
        summary="full-matrix AdaGrad over the last m gradients, through the matrix of their "
        "products; gradients alone",
        paper="Agarwal et al. (2018)",
        equation="U = [(G Gᵀ)^(1/2) + ε I]⁻¹ v, G the last m gradients",
        needs=frozenset({"gradient"}),
        state=lambda sizes: sizes.r * sizes.p * sizes.q,
        state_text="m p q (and m² once)",
        cost=("nothing", "O(m D + m³) for D parameters"),
        test="tests/methods/test_windows.py::test_ggt_is_the_dense_root",
        build=lambda layers, **options: ggt(**(_SHORT | options)),
        block_of=None,
        across=lambda layers: 4,
    ),
)
