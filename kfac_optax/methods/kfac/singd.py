"""SINGD: natural gradient without inverses, with structured roots."""

import functools
from typing import Any

import optax

from kfac_optax._types import Block, Layer, Layers, Numeric, ScalarOrSchedule
from kfac_optax.blocks.kronecker.inverse_free import inverse_free
from kfac_optax.engine.choice import BlockOf, beside_blocks, blocks_of
from kfac_optax.methods.kfac.fixed import kfac
from kfac_optax.methods.record import SHORT, Method, Sizes
from kfac_optax.methods.signature import flat_signature

# Words of `kfac` that the block decides on; its roots move with the statistics, not at refreshes.
_SET = ("block", "inverse", "convolution", "recurrence", "factored_gradient")


@flat_signature(kfac, without=_SET)
def singd(
    layers: Layers,
    *,
    structure: str = "diagonal",
    size: int = 30,
    root_rate: Numeric = 1e-2,
    root_momentum: Numeric = 0.5,
    coupled: bool = True,
    kl_clip: ScalarOrSchedule | None = None,
    sharing: str = "expand",
    positions: int | None = None,
    normalization: str = "unitwise",
    precision: Any = "highest",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """SINGD: K-FAC that follows structured roots of its inverse factors, by products alone.

    `U = K K^T V C C^T` per layer, where every statistic moves `K K^T ~ A^{-1}` and
    `C C^T ~ G^{-1}` by a step of `root_rate`, see `inverse_free`. Nothing is factorised. The state
    is four times the numbers of a root: `d` each with `"diagonal"` and `"toeplitz"`, `d size` with
    `"block"`, `d^2` with `"dense"` and `"triangular"`.

    Embeddings and normalisation layers get the blocks of `kfac`, refreshed every `inverse_every`
    steps.

    Args:
      layers: from `fisher.layers(params, *args)`.
      structure: `"dense"`, `"diagonal"`, `"block"`, `"triangular"` or `"toeplitz"`.
      size: coordinates in a block of `"block"`, at most.
      root_rate: step of the roots at a statistic, in (0, 1].
      root_momentum: of these steps, in [0, 1).
      coupled: scales each factor by the trace of the other; `False` with `root_momentum=0` is
        IKFAC.
      kl_clip: as for `kfac`; `None`, as here, for none.
      sharing: positions that share a weight: `"expand"` or `"reduce"`.
      positions: at most about this many positions of an example are measured; `None` for all.
      normalization: scale and shift of normalisation layers: `"unitwise"`, `"diagonal"` or
        `"pass"`.
      precision: matmul precision of statistics, steps and solves.
      **options: as for `kfac`. `decay` and `inverse_every` have no influence on the roots.

    Returns:
      A transformation, to be chained with the optimizer that takes the step, as `kfac`.

    Raises:
      ValueError: a hyperparameter out of range, an unknown word.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((2, 1)), jnp.array([[2.0, 0.0]])
    >>> tx = singd(estimator.layers(w, x), root_rate=0.1, damping=0.0)
    >>> updates, state = tx.update(jnp.ones((2, 1)), tx.init(w), w, curvature=estimator.at(w, x))
    >>> [f"{u:.4f}" for u in updates.ravel()]
    ['0.6521', '0.9950']

    Reference: Lin, Dangel, Eschenhagen, Neklyudov, Kristiadi, Turner & Makhzani, Structured
      Inverse-Free Natural Gradient: Memory-Efficient & Numerically-Stable KFAC (2024).
    """
    # K <- K (I - beta m): the rate beta, and the momentum of m
    roots: dict[str, Any] = dict(root_rate=root_rate, root_momentum=root_momentum)
    roots |= dict(coupled=coupled, sharing=sharing, positions=positions, precision=precision)
    # the shape of a layer decides on its structure's sizes
    make = functools.partial(inverse_free, structure=structure, size=size, **roots)
    return kfac(
        layers,
        block=_blocks(make, normalization, precision),
        normalization=beside_blocks(normalization),
        kl_clip=kl_clip,
        precision=precision,
        **options,
    )


def _blocks(make: Any, normalization: str, precision: Any) -> BlockOf:
    """A block of roots for every shape; other kinds of layers get what `kfac` gives them."""
    made = functools.cache(make)
    # stands for every layer that gets roots, and checks the words
    linear = made((1, 1))
    others = blocks_of(linear, normalization=normalization, precision=precision)

    def block_of(layer: Layer) -> Block:
        # embeddings and normalisation layers keep the blocks of `kfac`
        other = others(layer)
        return made(layer.shape) if other is linear else other

    return block_of


TEST = "tests/blocks/test_inverse_free.py::test_steps_are_the_dense_formula"


def _diagonal_numbers(sizes: Sizes) -> int:
    """Roots and momenta of both sides, and the two means."""
    # K, m of inputs [p], C, m of outputs [q]
    return 2 * (sizes.p + sizes.q) + 2


RECORDS = (
    Method(
        name="singd",
        kind="preconditioner",
        summary="the same with structured roots: `structure=` diagonal, block, triangular, toeplitz",
        paper="Lin, Dangel, Eschenhagen, Neklyudov, Kristiadi, Turner & Makhzani (2024)",
        equation="as ingd, m projected on the structure",
        needs=frozenset({"gradient", "curvature"}),
        state=_diagonal_numbers,
        state_text="2 (p + q) + 2 with diagonal roots",
        # diagonals are multiplied entry by entry
        cost=("O(d) with diagonal roots", "O(d²)"),
        test=TEST,
        build=lambda layers, **options: singd(layers, **(SHORT | options)),
        block_of=lambda layer: inverse_free(layer.shape, "diagonal"),
    ),
)
