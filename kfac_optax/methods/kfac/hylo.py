"""HyLo: natural gradient in the space of a few examples."""

import functools
from typing import Any

import optax

from kfac_optax._types import Layers, ScalarOrSchedule
from kfac_optax.blocks.sample_space.hylo import Critical, hylo_block
from kfac_optax.engine.choice import beside_blocks
from kfac_optax.methods.kfac.ekfac import OF_THE_BLOCK, where_examples
from kfac_optax.methods.kfac.fixed import kfac
from kfac_optax.methods.record import SHORT, Method, Sizes
from kfac_optax.methods.signature import flat_signature


@flat_signature(kfac, without=OF_THE_BLOCK)
def hylo(
    layers: Layers,
    *,
    rank: int = 32,
    selection: str = "switch",
    critical: Critical = 10,
    seed: int = 0,
    kl_clip: ScalarOrSchedule | None = None,
    normalization: str = "unitwise",
    precision: Any = "highest",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """HyLo: `U = (F + damping I)^{-1} V` per layer, with the Fisher matrix of `rank` examples of the
    last batch.

    `F = (1/N) sum_b vec(D_b) vec(D_b)^T` has no Kronecker factors; its inverse is taken in the space
    of examples, exactly where the batch has no more rows than `rank` (SNGD), else of rows chosen by
    interpolative decomposition (KID) in the critical part of a training and by importance sampling
    (KIS) in the rest, see `hylo_block`. Positions of an example are pooled: inputs averaged, output
    gradients added up.

    With the gradients of the data's own losses, `empirical_fisher(...)`, it is the method of the
    paper; `fisher` and `ggn` serve as well, the latter with a row for every column of the output.
    Embeddings, normalisation layers and layers without rows of examples get the blocks of `kfac`.

    Args:
      layers: from `empirical_fisher(...).layers(params, *args)`, or another estimator's.
      rank: rows that are kept, of a whole batch.
      selection: `"kid"`, `"kis"` or `"switch"`.
      critical: of `"switch"`: how many statistics at the start are critical, or a function of their
        number (from 1) that says so, for example after the rate was lowered.
      seed: of draws.
      kl_clip: as for `kfac`; `None`, as here, for none.
      normalization: scale and shift of normalisation layers: `"unitwise"`, `"diagonal"` or
        `"pass"`.
      precision: matmul precision of products.
      **options: as for `kfac`. The damping is exact, that of the last statistic; `decay` and
        `inverse_every` concern the other blocks alone.

    Returns:
      A transformation, to be chained with the optimizer that takes the step, as `kfac`.

    Raises:
      ValueError: a hyperparameter out of range.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> loss = lambda w, x: ko.tap_dense(x @ w, x, w)[:, 0]
    >>> estimator, w, x = ko.empirical_fisher(loss), jnp.zeros((2, 1)), jnp.array([[1.0, 0.0]])
    >>> tx = hylo(estimator.layers(w, x), damping=1.0)
    >>> updates, state = tx.update(jnp.ones((2, 1)), tx.init(w), w, curvature=estimator.at(w, x))
    >>> print(updates.ravel())
    [0.5 1. ]

    Reference: Mu, Soori, Can, Gürbüzbalaban & Mehri Dehnavi, HyLo: A Hybrid Low-Rank Natural
      Gradient Descent Method (2022).
    """
    words: dict[str, Any] = dict(selection=selection, critical=critical, seed=seed)
    # one block for every shape, so that layers of equal shape share a batched call
    made = functools.cache(functools.partial(hylo_block, rank=rank, precision=precision, **words))
    made((1, 1))  # checks what it is given
    return kfac(
        layers,
        # vec(a_b g_b^T) is known where rows are those of examples
        block=where_examples(lambda layer: made(layer.shape), normalization, precision),
        normalization=beside_blocks(normalization),
        kl_clip=kl_clip,
        precision=precision,
        **options,
    )


def _numbers(sizes: Sizes) -> int:
    """Rows, the matrix between them, the damping and the mean eigenvalue."""
    return sizes.r * (sizes.p + sizes.q) + sizes.r**2 + 2


# fewer rows than the batch has; one critical statistic, then draws
_SHORT = SHORT | {"rank": 2, "critical": 1}

RECORDS = (
    Method(
        name="hylo",
        kind="preconditioner",
        summary="the Fisher matrix of `rank=` examples, inverted in their space: interpolative "
        "decomposition, then importance sampling",
        paper="Mu, Soori, Can, Gürbüzbalaban & Mehri Dehnavi (2022)",
        equation="U = (F + λ I)⁻¹ V = (V - Uᵀ C U V) / λ, rows of U those of `rank` examples",
        needs=frozenset({"gradient", "curvature"}),
        state=_numbers,
        state_text="r (p + q) + r² + 2",
        cost=("O(d n² + n³) at every statistic", "O(d² r)"),
        test="tests/blocks/test_hylo.py::test_enough_rows_are_the_exact_inverse",
        build=lambda layers, **options: hylo(layers, **(_SHORT | options)),
        block_of=lambda layer: hylo_block(layer.shape, _SHORT["rank"]),
    ),
)
