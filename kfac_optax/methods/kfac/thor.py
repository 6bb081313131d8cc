"""THOR: factors in small blocks, and every layer's own say about its refresh."""

import functools
from typing import Any

import optax

from kfac_optax._types import Block, Layer, Layers, Numeric, ScalarOrSchedule
from kfac_optax.blocks.kronecker.split_kronecker import split_kronecker
from kfac_optax.blocks.refresh_rules.trace_gate import trace_gate
from kfac_optax.engine.choice import BlockOf, beside_blocks, blocks_of
from kfac_optax.linalg.groups import group_sizes
from kfac_optax.methods.kfac.fixed import kfac
from kfac_optax.methods.record import SHORT, Method, Sizes
from kfac_optax.methods.signature import flat_signature

# Words of `kfac` that the block decides on.
_SET = ("block", "inverse", "convolution", "recurrence", "factored_gradient")


@flat_signature(kfac, without=_SET)
def thor(
    layers: Layers,
    *,
    size: int = 128,
    refresh_above: Numeric = 0.01,
    freeze_below: Numeric = 0.001,
    kl_clip: ScalarOrSchedule | None = None,
    decay: ScalarOrSchedule = 0.0,
    curvature_every: ScalarOrSchedule = 100,
    inverse_every: ScalarOrSchedule = 100,
    sharing: str = "expand",
    positions: int | None = None,
    balanced: bool = True,
    normalization: str = "unitwise",
    precision: Any = "highest",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """THOR: K-FAC with factors in small blocks, whose layers are refreshed as long as their traces
    change.

    `U = (A + sqrt(damping) I)^{-1} V (G + sqrt(damping) I)^{-1}` per layer, with `A` and `G` zero
    outside of blocks of `size` on their diagonals, see `split_kronecker`. Every `inverse_every`
    steps a layer compares the trace of its damped block with that of the inverse in use and is
    refreshed, left as it is, or left so for good, see `trace_gate`; where no layer of a shape is
    due nothing is factorised. An `inverse_every` that grows is a schedule of the step.

    Embeddings and normalisation layers get the blocks of `kfac`, without a gate.

    Args:
      layers: from `fisher.layers(params, *args)`.
      size: coordinates in a block of a factor, at most.
      refresh_above: relative change of the trace that is worth a refresh; 0 refreshes always.
      freeze_below: one that ends a layer's refreshes, not above the former; 0 freezes none.
      kl_clip: as for `kfac`; `None`, as here, for none.
      decay: bound of the averaging weight; 0 keeps the statistics of the last batch alone. An
        average changes more slowly than that, which the gate's bounds have to allow for.
      curvature_every: period of the statistics.
      inverse_every: period of the gate's looks.
      sharing: positions that share a weight: `"expand"` or `"reduce"`.
      positions: at most about this many positions of an example are measured; `None` for all.
      balanced: whether both factors of a convolution share the number of its positions, see
        `split_kronecker`.
      normalization: scale and shift of normalisation layers: `"unitwise"`, `"diagonal"` or
        `"pass"`.
      precision: matmul precision of factor products and solves.
      **options: as for `kfac`.

    Returns:
      A transformation, to be chained with the optimizer that takes the step, as `kfac`.

    Raises:
      ValueError: a hyperparameter out of range, `freeze_below > refresh_above`.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((2, 1)), jnp.eye(2)
    >>> tx = thor(estimator.layers(w, x), damping=0.25)
    >>> updates, state = tx.update(jnp.ones((2, 1)), tx.init(w), w, curvature=estimator.at(w, x))
    >>> [f"{u:.3f}" for u in updates.ravel()]
    ['0.667', '0.667']

    Reference: Chen et al., THOR, Trace-based Hardware-driven Layer-Oriented Natural Gradient
      Descent Computation (2021).
    """
    # A and G zero outside of blocks on their diagonals
    split = split_kronecker(
        size, sharing=sharing, positions=positions, balanced=balanced, precision=precision
    )
    # embeddings and normalisation layers keep the blocks of `kfac`
    others = blocks_of(split, inverse="cholesky", normalization=normalization, precision=precision)
    return kfac(
        layers,
        # what is due at a refresh is each layer's own say
        block=_gated(split, others, refresh_above, freeze_below),
        normalization=beside_blocks(normalization),
        kl_clip=kl_clip,
        decay=decay,
        curvature_every=curvature_every,
        inverse_every=inverse_every,
        precision=precision,
        **options,
    )


def _gated(
    split: Block,
    others: BlockOf,
    refresh_above: Numeric,
    freeze_below: Numeric,
) -> BlockOf:
    """The split block behind a gate, one for every shape; other kinds of layers as they are."""

    @functools.cache
    def made(shape: tuple[int, int]) -> Block:
        return trace_gate(split, shape, refresh_above=refresh_above, freeze_below=freeze_below)

    made((1, 1))  # checks the bounds

    # layers of other kinds are refreshed with every period
    def block_of(layer: Layer) -> Block:
        other = others(layer)
        return made(layer.shape) if other is split else other

    return block_of


def _numbers(sizes: Sizes) -> int:
    """Blocks of both factors and of their inverses, and what the gate remembers."""
    factors = 0
    # the last block of a factor is padded
    for dimension in (sizes.p, sizes.q):
        count, width = group_sizes(dimension, sizes.r)
        factors += count * width**2
    # blocks and their inverses; the four numbers of `Gated`
    return 2 * factors + 4


_SHORT = SHORT | {"size": 2}


def _short_block(layer: Layer) -> Block:
    return trace_gate(split_kronecker(_SHORT["size"]), layer.shape)


RECORDS = (
    Method(
        name="thor",
        kind="preconditioner",
        summary="factors in blocks of `size=` on their diagonals; a layer is refreshed while the "
        "trace of its block changes",
        paper="Chen et al. (2021)",
        equation="U = (A + √λ I)⁻¹ V (G + √λ I)⁻¹, A, G block-diagonal",
        needs=frozenset({"gradient", "curvature"}),
        state=_numbers,
        state_text="2 (p + q) r + 4, blocks of r padded to full ones",
        cost=("O(d r²), where a layer is due", "O(d² r)"),
        test="tests/methods/test_thor.py::test_one_group_is_factored_tikhonov_shared_equally",
        build=lambda layers, **options: thor(layers, **(_SHORT | options)),
        block_of=_short_block,
    ),
)
