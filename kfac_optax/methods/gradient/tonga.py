"""TONGA: natural gradient from a decayed covariance of gradients of low rank."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from kfac_optax._types import PyTree, ScalarOrSchedule
from kfac_optax._validate import check_number
from kfac_optax.linalg.factorize import psd_eigh, shift_for
from kfac_optax.linalg.smw import factor_kernel, kernel_solve
from kfac_optax.methods.gradient.gate import when_due
from kfac_optax.methods.gradient.treewise import Made, Rule, Step, transformation
from kfac_optax.methods.gradient.window import (
    Window,
    check_length,
    combine,
    empty_window,
    put_at,
)
from kfac_optax.methods.record import Method
from kfac_optax.methods.signature import check_size, flat_signature


@flat_signature()
def tonga(
    *,
    rank: int = 5,
    block: int = 50,
    damping: ScalarOrSchedule = 1e-3,
    decay: ScalarOrSchedule = 0.995,
) -> optax.GradientTransformationExtraArgs:
    """TONGA: the damped inverse of a decayed sum of gradient products, a few directions of which
    are kept.

    `C <- decay C + V V^T` and `U = (C + damping I)^{-1} V`. `C = X X^T` is kept by `rank + block`
    columns: the gradients of the last steps, and every `block` steps all of them are replaced by
    `rank` leading eigenvectors times the roots of their eigenvalues. As `V` is a column of `X`,
    `U = X (X^T X + damping I)^{-1} e`. The sum is not divided by the number of its terms: with
    `decay` near one `C` grows to the second moment of the gradients over `1 - decay`.

    All parameters are one block. For a block of each layer give every layer its own by
    `optax.partition`. The step costs `O((rank + block) d + (rank + block)^3)`. Chain it with what
    takes the step.

    Args:
      rank: eigenvectors that are kept.
      block: steps between two compressions.
      damping: positive; in units of the squared norm of a gradient. It counts as rounding of the
        trace of `C` at least.
      decay: of `C`; 1 for a sum.

    Returns:
      A transformation; its state has `(rank + block) d` numbers.

    Raises:
      TypeError: a leaf is complex or not floating.
      ValueError: a hyperparameter out of range; gradients of other parameters than `init` got.

    >>> tx = tonga(rank=1, block=2, damping=1.0)
    >>> g = jnp.array([2.0, 0.0])
    >>> updates, state = tx.update(g, tx.init(g))
    >>> print(updates.round(3))  # g / (|g|^2 + 1)
    [0.4 0. ]

    Reference: Le Roux, Manzagol & Bengio, Topmoumoute online natural gradient algorithm (2007).
    """
    where = "tonga"
    check_size(where, "rank", rank)
    check_size(where, "block", block)
    check_number(where, "damping", damping, above=0, schedule=True)
    hyper: dict[str, Any] = dict(damping=damping, decay=decay)

    def start(params: PyTree, dtype: Any) -> Window:
        return empty_window(rank + block, params, dtype)

    def step(given: Step) -> Made:
        vector = given.gradient
        check_length(where, given.held, vector)
        # the count is the next place, and goes back to the rank where columns are compressed
        full = given.finite & (given.held.count >= rank + block)
        old = when_due(full, lambda window: _compressed(window, rank), given.held)
        place = old.count
        held, fits = put_at(old, vector[None], place[None], given.finite)
        # C <- decay C + V V^T, where V is taken in: all columns but the new one
        newest = jnp.arange(rank + block) == place
        root = jnp.where(fits, jnp.sqrt(given.now["decay"]), 1)
        scale = jnp.where(newest, 1, root)
        rows = scale[:, None] * held.rows
        gram = scale[:, None] * held.gram * scale
        count = jnp.where(fits, place + 1, old.count)
        held = Window(rows, gram, count)
        # (X X^T + damping I)^{-1} g = X (X^T X + damping I)^{-1} e, g being the newest column
        shift = shift_for(given.now["damping"], jnp.trace(gram))
        kernel = factor_kernel(gram, shift)
        weights = kernel_solve(kernel, newest.astype(vector.dtype))
        direction = combine(held, weights)
        return Made(direction, held, fits, given.finite & ~fits)

    return transformation(Rule(where, hyper, start, step, guarded=False, flat=True))


def _compressed(window: Window, rank: int) -> Window:
    """The leading eigenvectors of `X X^T` times the roots of their eigenvalues, in the first places.

    With `X^T X = V diag(s^2) V^T` they are the columns of `X V`.
    """
    size = len(window.rows)
    vectors, squares = psd_eigh(window.gram)
    # ascending: the last are the largest
    falling = vectors[:, ::-1]
    leading = falling[:, :rank].T
    rows = jnp.matmul(leading, window.rows, precision=jax.lax.Precision.HIGHEST)
    kept = jnp.zeros_like(window.rows).at[:rank].set(rows)
    values = jnp.where(jnp.arange(size) < rank, squares[::-1], 0)
    count = jnp.full((), rank, jnp.int32)
    return Window(kept, jnp.diag(values), count)


_SHORT: dict[str, Any] = dict(rank=2, block=1, damping=0.05)

RECORDS = (
    Method(
        name="tonga",
        kind="preconditioner",
        summary="the damped inverse of a decayed sum of gradient products, of which k directions "
        "are kept; gradients alone",
        paper="Le Roux, Manzagol & Bengio (2007)",
        equation="C ← γ C + V Vᵀ, U = (C + λ I)⁻¹ V",
        needs=frozenset({"gradient"}),
        state=lambda sizes: (sizes.r + 1) * sizes.p * sizes.q,
        state_text="(k + b) p q (and (k + b)² once), b steps between two compressions",
        cost=("O((k + b) D) for D parameters", "O((k + b) D)"),
        test="tests/methods/test_windows.py::test_tonga_is_the_dense_inverse_of_what_it_keeps",
        build=lambda layers, **options: tonga(**(_SHORT | options)),
        block_of=None,
        across=lambda layers: 9,
    ),
)
