"""KPSVD: the nearest Kronecker product to the Fisher block of a layer, or two of them."""

from typing import Any

import optax

from kfac_optax._types import Block, Layers
from kfac_optax._validate import check_choice, check_unused
from kfac_optax.blocks.kronecker.kpsvd import kpsvd_block
from kfac_optax.blocks.kronecker.kpsvd_two import FIRST, kpsvd_two_block
from kfac_optax.engine.choice import beside_blocks
from kfac_optax.methods.kfac.ekfac import OF_THE_BLOCK, where_examples
from kfac_optax.methods.kfac.fixed import kfac
from kfac_optax.methods.record import SHORT_CLIPPED, Method, Sizes
from kfac_optax.methods.signature import flat_signature

RANKS = (1, 2)


@flat_signature(kfac, without=OF_THE_BLOCK)
def kpsvd(
    layers: Layers,
    *,
    rank: int = 1,
    first: str = "svd",
    inverse: str = "eigh",
    normalization: str = "unitwise",
    precision: Any = "highest",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """KPSVD: K-FAC with the Kronecker product that is nearest to the Fisher block, or with a sum of
    two.

    - `rank=1`: `U = (A (x) G + damping I)^{-1} V`, `A (x) G` the minimiser of
      `|F - A (x) G|` in the Frobenius norm, see `kpsvd_block`;
    - `rank=2`: `F ~ A_1 (x) G_1 + A_2 (x) G_2` with the two leading terms of the rearranged block
      (deflation), or `first="kfac"`: the product of `kfac`, and the best correction of it. The
      damping is shared out between both factors, see `kpsvd_two_block`.

    Nothing of the size of `F` is formed: each statistic is one step of the power iteration, whose
    directions go on from those of the last, so more statistics (`curvature_every`) mean better
    factors. A layer without rows of examples (see the coverage table) gets the block of `kfac`, as
    do embeddings and normalisation layers.

    Args:
      layers: from `fisher.layers(params, *args)`.
      rank: how many products, 1 or 2.
      first: of two, `"svd"` or `"kfac"`.
      inverse: of one, `"eigh"` (exact damping) or `"cholesky"` (factored damping).
      normalization: scale and shift of normalisation layers: `"unitwise"`, `"diagonal"` or
        `"pass"`.
      precision: matmul precision of statistics and solves.
      **options: as for `kfac`.

    Returns:
      A transformation, to be chained with the optimizer that takes the step, as `kfac`.

    Raises:
      ValueError: a hyperparameter out of range, a word unknown or without effect, or KL-clip
        without a rate.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((2, 1)), jnp.eye(2)
    >>> tx = kpsvd(estimator.layers(w, x), learning_rate=1.0, damping=0.5, kl_clip=None)
    >>> updates, state = tx.update(jnp.ones((2, 1)), tx.init(w), w, curvature=estimator.at(w, x))
    >>> print(updates.ravel())
    [1. 1.]

    Reference: Koroko et al., Efficient Approximations of the Fisher Matrix in Neural Networks using
      Kronecker Product Singular Value Decomposition (2022).
    """
    # power iterations need a and g of every example
    block = _block(rank, first, inverse, precision)
    return kfac(
        layers,
        block=where_examples(block, normalization, precision),
        normalization=beside_blocks(normalization),
        precision=precision,
        **options,
    )


def _block(rank: int, first: str, inverse: str, precision: Any) -> Block:
    if rank not in RANKS:
        raise ValueError(
            f"kpsvd: rank={rank!r}; expected 1 or 2, the number of Kronecker products of a layer."
        )
    check_choice("kpsvd", "first", first, FIRST)
    if rank == 1:
        # one product, its damping exact or shared out between both factors
        check_unused(
            "kpsvd", "rank=1 (of K-FAC's product alone that is kfac)", first=(first, "svd")
        )
        return kpsvd_block(inverse, precision=precision)
    # A_1 (x) G_1 + A_2 (x) G_2, both factors of the first with their share of the damping
    check_unused("kpsvd", "rank=2, whose damping is factored", inverse=(inverse, "eigh"))
    return kpsvd_two_block(first, precision=precision)


def _numbers(s: Sizes) -> int:
    """Both products and their scale, both directions, and the factors' eigendecompositions."""
    # on each side the factor, the direction of the next iteration, and eigenvectors
    return 3 * (s.p**2 + s.q**2) + s.p + s.q + 1


RECORDS = (
    Method(
        name="kpsvd",
        kind="preconditioner",
        summary="K-FAC with the Kronecker product nearest to the Fisher block, by power iterations "
        'from rows; `rank=2`: two products; `first="kfac"`: a correction of K-FAC',
        paper="Koroko et al. (2022)",
        equation="U = (A ⊗ G + λ I)⁻¹ V, (A, G) = argmin ‖F - A ⊗ G‖",
        needs=frozenset({"gradient", "curvature"}),
        state=_numbers,
        state_text="3 (p² + q²) + p + q + 1",
        cost=("O(d³)", "O(d³)"),
        test="tests/blocks/test_kpsvd.py::"
        "test_the_error_is_that_of_the_singular_value_decomposition",
        build=lambda layers, **options: kpsvd(layers, **(SHORT_CLIPPED | options)),
        block_of=lambda layer: kpsvd_block(),
    ),
)
