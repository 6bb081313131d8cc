"""K-FAC whose inverses cost less than the cube of a layer's width: from sketches, or followed
online.
"""

import functools
from collections.abc import Callable
from typing import Any

import optax

from kfac_optax._types import Block, Layer, Layers
from kfac_optax._validate import check_choice, check_number
from kfac_optax.blocks.low_rank import low_rank
from kfac_optax.engine.choice import BlockOf, beside_blocks, blocks_of
from kfac_optax.methods.kfac.fixed import kfac
from kfac_optax.methods.record import Method, Sizes
from kfac_optax.methods.signature import flat_signature

Rank = int | Callable[[Layer], int]
# What the methods do with factors that are followed online: overwrite them with a sketch, correct
# some of their directions.
_ONLINE = {
    "b_kfac": (False, False),
    "b_r_kfac": (True, False),
    "b_kfac_c": (False, True),
    "b_r_c": (True, True),
}
METHODS = ("rs_kfac", *_ONLINE)
_OF_BLOCKS = (
    "rank",
    "correct_every",
    "correct_share",
    "oversampling",
    "power_iterations",
    "variant",
    "rest",
    "damping_rule",
    "target_error",
    "seed",
)
_OF_BLOCKS_ALONE = ("inverse", "convolution", "recurrence", "sharing", "positions")
_OF_BOTH = ("normalization", "precision")
# Words of `low_rank` and `kfac` that the presets decide on themselves.
_SET = ("block", "online", "overwrite", "correct_every")


def low_rank_blocks(
    method: str = "b_kfac",
    *,
    rank: Rank = 128,
    correct_every: int = 5,
    inverse: str = "eigh",
    normalization: str = "unitwise",
    convolution: str = "kfc",
    recurrence: str = "independent",
    precision: Any = "highest",
    **options: Any,
) -> BlockOf:
    """The block that every layer gets from a method with low-rank factors: a function for `block=`,
    or for `coverage`.

    A factor of dimension `d` is followed online where the method does that, the layer is dense,
    positions are not pooled (`sharing="reduce"`), and `rank + rows < d`, with the rows of the
    traced batch (positions count); otherwise its dense average is kept and sketched at every
    refresh. A factor with `d <= rank` is decomposed as a whole (`clamped` in the table where the
    rank is larger).

    Args:
      method: `"rs_kfac"`, `"b_kfac"`, `"b_r_kfac"`, `"b_kfac_c"` or `"b_r_c"`.
      rank: eigenpairs of each factor; or a function of the layer.
      correct_every: statistics between corrections, of methods that correct.
      inverse: of embeddings.
      normalization: as for `kfac`.
      convolution: as for `kfac`.
      recurrence: as for `kfac`.
      precision: matmul precision.
      **options: further arguments of `low_rank`.

    Raises:
      ValueError: unknown method, `rank < 1`, an argument of `low_rank` out of range.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> layers = estimator.layers(jnp.zeros((100, 3)), jnp.ones((5, 100)))
    >>> print(ko.coverage(layers, block=low_rank_blocks(rank=8)))
    layer   kind   kernel  bias  uses  block                                        state bytes
    ------  -----  ------  ----  ----  -------------------------------------------  -----------
    (root)  dense  100x3   no    1     low rank (8 of 100 online x all 3, clamped)  3,748
    total                                                                           3,748
    """
    where = "low_rank_blocks"
    check_choice(where, "method", method, METHODS)
    if not callable(rank):
        check_number(where, "rank", rank, at_least=1)
    overwrite, corrected = _ONLINE.get(method, (False, False))
    options |= {
        "overwrite": overwrite,
        "correct_every": correct_every if corrected else None,
        "precision": precision,
    }

    @functools.cache
    def made(rank: int, shape: tuple[int, int], online: tuple[bool, bool]) -> Block:
        block = low_rank(rank, online=online, **options)
        return block._replace(
            name=f"low rank ({' x '.join(map(functools.partial(_describe, rank), shape, online))})"
        )

    linear = made(1 if callable(rank) else rank, (1, 1), (False, False))  # checks what it is given
    others = blocks_of(
        linear,
        inverse=inverse,
        normalization=normalization,
        convolution=convolution,
        recurrence=recurrence,
        precision=precision,
    )
    rows_apart = method in _ONLINE and options.get("sharing", "expand") == "expand"

    def block_of(layer: Layer) -> Block:
        other = others(layer)
        if other is not linear:
            return other
        mine = rank(layer) if callable(rank) else rank
        follows = rows_apart and layer.kind in ("dense", "einsum")
        p, q = (follows and mine + layer.rows < d for d in layer.shape)
        return made(mine, layer.shape, (p, q))

    return block_of


def _describe(rank: int, dimension: int, online: bool) -> str:
    if rank >= dimension:
        return f"all {dimension}, clamped" if rank > dimension else f"all {dimension}"
    return f"{rank} of {dimension} {'online' if online else 'sketched'}"


@flat_signature(kfac, low_rank, without=(*_SET, "correct_share"))
def rs_kfac(
    layers: Layers, *, rank: Rank = 128, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Randomised K-FAC: factors are averaged densely, and a refresh takes the leading eigenpairs
    from a random sketch.

    `O(d^2 rank)` for each factor where an eigendecomposition takes `O(d^3)`, and solves in
    `O(rank)` for every entry.

    Args:
      layers: from `fisher.layers(params, *args)`.
      rank: eigenpairs of each factor; or a function of the layer.
      **options: of `kfac` (but `block`), and of `low_rank`: `oversampling`, `power_iterations`,
        `variant`, `rest`, `damping_rule`, `target_error`, `seed`.

    Returns:
      A transformation, to be chained with the optimizer that takes the step, as `kfac`.

    Raises:
      ValueError: a hyperparameter out of range.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((2, 1)), jnp.eye(2)
    >>> tx = rs_kfac(estimator.layers(w, x), rank=1, rest="smallest", learning_rate=1.0, damping=0.25, kl_clip=None)
    >>> updates, state = tx.update(jnp.ones((2, 1)), tx.init(w), w, curvature=estimator.at(w, x))
    >>> [f"{u:.3f}" for u in updates.ravel()]
    ['0.686', '0.686']

    Reference: Puiu, Randomized K-FACs: Speeding up K-FAC with Randomized Numerical Linear Algebra
      (2022), whose damping and left-out eigenvalues are `damping_rule="relative"` and
      `rest="zero"`.
    """
    return _preset("rs_kfac", layers, rank=rank, **options)


@flat_signature(kfac, low_rank, without=(*_SET, "correct_share"))
def b_kfac(
    layers: Layers, *, rank: Rank = 128, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """B-KFAC: eigenpairs of wide dense layers' factors follow the rows of every statistic, at
    linear cost in the width.

    `(U, D) <- ` the leading pairs of `e U D U^T + (1 - e) Y Y^T`, with `Y` the rows of the batch,
    see `brand_update`; the factors themselves are never formed. Layers that are too small for it,
    and convolutions, are handled as by `rs_kfac`. As updates are cheap, `curvature_every` may be
    small; `inverse_every` concerns those other layers only.

    Args:
      layers: from `fisher.layers(params, *args)`, traced on a batch of the size that will be used.
      rank: eigenpairs of each factor; or a function of the layer.
      **options: as for `rs_kfac`.

    Returns:
      A transformation, to be chained with the optimizer that takes the step, as `kfac`.

    Raises:
      ValueError: a hyperparameter out of range.

    >>> import jax, jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.fisher(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((64, 2)), jax.random.normal(jax.random.key(0), (8, 64))
    >>> tx = b_kfac(estimator.layers(w, x), rank=8, learning_rate=1.0)
    >>> _, state = tx.update(w, tx.init(w), w, curvature=estimator.at(w, x, key=jax.random.key(1)))
    >>> print(f"{ko.diagnostics(state)['captured_energy']:.4f}")
    1.0000

    Reference: Puiu, Brand New K-FACs: Speeding up K-FAC with Online Decomposition Updates (2022),
      whose damping and left-out eigenvalues are `damping_rule="relative"` and `rest="smallest"`.
    """
    return _preset("b_kfac", layers, rank=rank, **options)


@flat_signature(kfac, low_rank, without=(*_SET, "correct_share"))
def b_r_kfac(
    layers: Layers, *, rank: Rank = 128, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """B-R-KFAC: `b_kfac`, and every `inverse_every` steps a sketch of the dense average overwrites
    the eigenpairs.

    Between two sketches of `rs_kfac` the eigenpairs stay up to date; the dense averages are kept
    for it.

    Args:
      layers: from `fisher.layers(params, *args)`, traced on a batch of the size that will be used.
      rank: eigenpairs of each factor; or a function of the layer.
      **options: as for `rs_kfac`.

    Returns:
      A transformation, to be chained with the optimizer that takes the step, as `kfac`.

    Raises:
      ValueError: a hyperparameter out of range.

    >>> import jax, jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.fisher(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((64, 2)), jnp.ones((5, 64))
    >>> tx = b_r_kfac(estimator.layers(w, x), rank=8, learning_rate=1.0)
    >>> state = jax.eval_shape(tx.init, w).preconditioner  # nothing is computed
    >>> print(state.factors["dense_64x2"].inputs.shape, state.inverses["dense_64x2"].inputs.low.vectors.shape)
    (1, 64, 64) (1, 64, 8)

    Reference: Puiu, Brand New K-FACs: Speeding up K-FAC with Online Decomposition Updates (2022).
    """
    return _preset("b_r_kfac", layers, rank=rank, **options)


@flat_signature(kfac, low_rank, without=_SET)
def b_kfac_c(
    layers: Layers,
    *,
    rank: Rank = 128,
    correct_every: int = 5,
    correct_share: float = 0.2,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """B-KFAC-C: `b_kfac`, and now and then some directions, drawn at random, are brought up to date
    with the dense average.

    With `U_c` those columns, `U_c^T X U_c = W L W^T`, `U_c <- U_c W`, `D_c <- L`, in `O(d^2)` for
    each; see `correct_directions`. The dense averages are kept for it.

    Args:
      layers: from `fisher.layers(params, *args)`, traced on a batch of the size that will be used.
      rank: eigenpairs of each factor; or a function of the layer.
      correct_every: statistics between corrections.
      correct_share: share of the directions, one more is added.
      **options: as for `rs_kfac`.

    Returns:
      A transformation, to be chained with the optimizer that takes the step, as `kfac`.

    Raises:
      ValueError: a hyperparameter out of range.

    >>> import jax, jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.fisher(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((64, 2)), jnp.ones((5, 64))
    >>> tx = b_kfac_c(estimator.layers(w, x), rank=8, learning_rate=1.0)
    >>> state = jax.eval_shape(tx.init, w).preconditioner  # nothing is computed
    >>> print(state.factors["dense_64x2"].inputs.shape, state.inverses["dense_64x2"].inputs.low.vectors.shape)
    (1, 64, 64) (1, 64, 8)

    Reference: Puiu, Brand New K-FACs: Speeding up K-FAC with Online Decomposition Updates (2022).
    """
    return _preset(
        "b_kfac_c",
        layers,
        rank=rank,
        correct_every=correct_every,
        correct_share=correct_share,
        **options,
    )


@flat_signature(kfac, low_rank, without=_SET)
def b_r_c(
    layers: Layers,
    *,
    rank: Rank = 128,
    correct_every: int = 5,
    correct_share: float = 0.2,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """`b_r_kfac` and `b_kfac_c` together: corrected between the sketches that overwrite.

    Args:
      layers: from `fisher.layers(params, *args)`, traced on a batch of the size that will be used.
      rank: eigenpairs of each factor; or a function of the layer.
      correct_every: statistics between corrections.
      correct_share: share of the directions, one more is added.
      **options: as for `rs_kfac`.

    Returns:
      A transformation, to be chained with the optimizer that takes the step, as `kfac`.

    Raises:
      ValueError: a hyperparameter out of range.

    >>> import jax, jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.fisher(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((64, 2)), jnp.ones((5, 64))
    >>> tx = b_r_c(estimator.layers(w, x), rank=8, learning_rate=1.0)
    >>> state = jax.eval_shape(tx.init, w).preconditioner  # nothing is computed
    >>> print(state.factors["dense_64x2"].inputs.shape, state.inverses["dense_64x2"].inputs.low.vectors.shape)
    (1, 64, 64) (1, 64, 8)

    Reference: Puiu, Brand New K-FACs: Speeding up K-FAC with Online Decomposition Updates (2022).
    """
    return _preset(
        "b_r_c",
        layers,
        rank=rank,
        correct_every=correct_every,
        correct_share=correct_share,
        **options,
    )


def _preset(method: str, layers: Layers, **options: Any) -> optax.GradientTransformationExtraArgs:
    """`kfac` with the blocks of a method; options of one, of the other, or of both."""
    for_blocks = {
        k: options[k] for k in (*_OF_BLOCKS, *_OF_BLOCKS_ALONE, *_OF_BOTH) if k in options
    }
    rest = {k: v for k, v in options.items() if k not in (*_OF_BLOCKS, *_OF_BLOCKS_ALONE)}
    if "normalization" in rest:
        rest["normalization"] = beside_blocks(rest["normalization"])
    return kfac(layers, block=low_rank_blocks(method, **for_blocks), **rest)


def _follows(d: int, s: Sizes) -> bool:
    return s.r + s.n < d


def _pairs(d: int, s: Sizes) -> int:
    """Eigenvectors, eigenvalues, and trace, rank in use, rest and damping of one factor."""
    kept = min(s.r, d)
    return kept * d + kept + 4


def _with_averages(s: Sizes) -> int:
    return sum(d * d + _pairs(d, s) for d in (s.p, s.q))


def _without_averages(s: Sizes) -> int:
    """Of a factor that is followed online only the diagonal is kept."""
    return sum((d if _follows(d, s) else d * d) + _pairs(d, s) for d in (s.p, s.q))


_SHORT: dict[str, Any] = dict(
    learning_rate=0.1, damping=0.05, curvature_every=2, inverse_every=3, rank=2
)
_COMMON: dict[str, Any] = dict(
    kind="preconditioner", needs=frozenset({"gradient", "curvature"}), state=_with_averages
)
_DENSE = "d² + r d + r + 4 for each factor"
_TESTS = "tests/methods/test_low_rank_presets.py::"
_ONLINE_PAPER = "Puiu, *Brand New K-FACs* (2022)"

RECORDS = (
    Method(
        name="rs_kfac",
        summary="`rank=` eigenpairs of each factor by a random sketch",
        paper="Puiu, *Randomized K-FACs* (2022)",
        equation="U = (Â + π√λ I)⁻¹ V (Ĝ + √λ/π I)⁻¹, Â, Ĝ from sketches of A, G",
        state_text=_DENSE,
        cost=("O(d² r)", "O(d² r)"),
        test=f"{_TESTS}test_full_rank_is_dense_kfac",
        build=lambda layers, **options: rs_kfac(layers, **(_SHORT | options)),
        block_of=low_rank_blocks("rs_kfac", rank=2),
        **_COMMON,
    ),
    Method(
        name="b_kfac",
        summary="eigenpairs followed online at linear cost",
        paper=_ONLINE_PAPER,
        equation="as rs_kfac, Â = leading pairs of e Â + (1 - e) Y Yᵀ, rows Y of the batch",
        state_text="d + r d + r + 4 for each factor with r + n < d, d² in place of d otherwise",
        cost=("O(d (r + n)²) at every statistic", "O(d² r)"),
        test=f"{_TESTS}test_enough_rank_is_dense_kfac",
        build=lambda layers, **options: b_kfac(layers, **(_SHORT | options)),
        block_of=low_rank_blocks("b_kfac", rank=2),
        **(_COMMON | {"state": _without_averages}),
    ),
    Method(
        name="b_r_kfac",
        summary="the same, overwritten by sketches",
        paper=_ONLINE_PAPER,
        equation="as b_kfac, Â from a sketch of A at every refresh",
        state_text=_DENSE,
        cost=("O(d² r), and O(d (r + n)²) at every statistic", "O(d² r)"),
        test=f"{_TESTS}test_overwriting_is_a_sketch_of_the_dense_average",
        build=lambda layers, **options: b_r_kfac(layers, **(_SHORT | options)),
        block_of=low_rank_blocks("b_r_kfac", rank=2),
        **_COMMON,
    ),
    Method(
        name="b_kfac_c",
        summary="followed online, some directions corrected now and then",
        paper=_ONLINE_PAPER,
        equation="as b_kfac, with U_cᵀ A U_c = W L Wᵀ: U_c ← U_c W, D_c ← L",
        state_text=_DENSE,
        cost=("O(d (r + n)²) at every statistic, O(d²) for each direction", "O(d² r)"),
        test=f"{_TESTS}test_correction_happens_on_its_period",
        build=lambda layers, **options: b_kfac_c(layers, **(_SHORT | options)),
        block_of=low_rank_blocks("b_kfac_c", rank=2),
        **_COMMON,
    ),
    Method(
        name="b_r_c",
        summary="followed online, corrected, overwritten by sketches",
        paper=_ONLINE_PAPER,
        equation="as b_kfac_c between sketches of b_r_kfac",
        state_text=_DENSE,
        cost=("O(d² r), and as b_kfac_c", "O(d² r)"),
        test=f"{_TESTS}test_correction_happens_on_its_period",
        build=lambda layers, **options: b_r_c(layers, **(_SHORT | options)),
        block_of=low_rank_blocks("b_r_c", rank=2),
        **_COMMON,
    ),
)
