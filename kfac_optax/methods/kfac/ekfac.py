"""Eigenvalue-corrected K-FAC as a preset."""

from typing import Any

import optax

from kfac_optax._types import Block, Layer, Layers
from kfac_optax.blocks.kronecker.ekfac import ekfac_block
from kfac_optax.blocks.kronecker.kronecker import kronecker
from kfac_optax.engine.choice import BlockOf, beside_blocks, blocks_of
from kfac_optax.methods.kfac.fixed import eigen_numbers, kfac
from kfac_optax.methods.record import SHORT_CLIPPED, Method, Sizes
from kfac_optax.methods.signature import flat_signature

# Words of `kfac` that the block decides on.
OF_THE_BLOCK = (
    "block",
    "inverse",
    "sharing",
    "positions",
    "convolution",
    "recurrence",
    "factored_gradient",
)


@flat_signature(kfac, without=OF_THE_BLOCK)
def ekfac(
    layers: Layers,
    *,
    normalization: str = "unitwise",
    precision: Any = "highest",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """EKFAC: K-FAC with the true second moments of the gradient in its eigenbasis.

    `U = U_A [(U_A^T V U_G) / (S + damping)] U_G^T` per layer, with `S` the mean over examples of
    the squared gradient in the eigenbasis of `A (x) G`, see `ekfac_block`. The basis is that of the
    last refresh, every `inverse_every` steps; `S` follows with every statistic, at the cost of
    matmuls only, so statistics may be more frequent than with `kfac`, and have to be more frequent
    than refreshes. A layer without rows of examples (see the coverage table) gets the block of
    `kfac`, as do embeddings and normalisation layers.

    Args:
      layers: from `fisher.layers(params, *args)`.
      normalization: scale and shift of normalisation layers: `"unitwise"`, `"diagonal"` or
        `"pass"`.
      precision: matmul precision of factor products, moments and solves.
      **options: as for `kfac`. The damping is exact, of layers with a mask factored; `decay` bounds
        the averaging weights of factors and moments, `inverse_every` is the period of the
        eigenbases.

    Returns:
      A transformation, to be chained with the optimizer that takes the step, as `kfac`.

    Raises:
      ValueError: a hyperparameter out of range, or KL-clip without a rate.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((2, 1)), jnp.eye(2)
    >>> tx = ekfac(estimator.layers(w, x), learning_rate=1.0, damping=0.5, kl_clip=None)
    >>> updates, state = tx.update(jnp.ones((2, 1)), tx.init(w), w, curvature=estimator.at(w, x))
    >>> print(updates.ravel())
    [1. 1.]

    Reference: George, Laurent, Bouthillier, Ballas & Vincent, Fast Approximate Natural Gradient
      Descent in a Kronecker-factored Eigenbasis (2018).
    """
    return kfac(
        layers,
        block=where_examples(ekfac_block(precision=precision), normalization, precision),
        normalization=beside_blocks(normalization),
        precision=precision,
        **options,
    )


def where_examples(
    block: Block | BlockOf,
    normalization: str,
    precision: Any,
    inverse: str = "eigh",
) -> BlockOf:
    """A block, or one for every layer, where the gradient is known for every example; else what
    `kfac` takes.
    """
    # what `kfac` gives to each kind of layer
    plain = kronecker(inverse, precision=precision)
    others = blocks_of(plain, inverse=inverse, normalization=normalization, precision=precision)

    def block_of(layer: Layer) -> Block:
        other = others(layer)
        # moments in the basis are means over examples, whose rows have to be known
        if other is not plain or not layer.per_example:
            return other
        return block if isinstance(block, Block) else block(layer)

    return block_of


def corrected_numbers(s: Sizes) -> int:
    """Those of K-FAC, the moments in its basis and their count."""
    # S [p, q], and how many statistics are in it
    return eigen_numbers(s) + s.p * s.q + 1


RECORDS = (
    Method(
        name="ekfac",
        kind="preconditioner",
        summary="K-FAC's eigenbasis with the true second moments of the gradient in it, moved by "
        "every statistic",
        paper="George, Laurent, Bouthillier, Ballas & Vincent (2018)",
        equation="U = U_A [(U_Aᵀ V U_G) / (S + λ)] U_Gᵀ, S = E[(U_Aᵀ a gᵀ U_G)²]",
        needs=frozenset({"gradient", "curvature"}),
        state=corrected_numbers,
        state_text="2 (p² + q²) + p q + p + q + 1",
        # every statistic moves S, a refresh the basis
        cost=("O(d³)", "O(d³)"),
        test="tests/blocks/test_ekfac.py::test_every_way_to_use_a_layer",
        build=lambda layers, **options: ekfac(layers, **(SHORT_CLIPPED | options)),
        block_of=lambda layer: ekfac_block(),
    ),
)
