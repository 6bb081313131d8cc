"""Records of the methods with low-rank factors, for the catalogue."""

from typing import Any

from kfac_optax.methods.kfac.low_rank_blocks import low_rank_blocks
from kfac_optax.methods.kfac.low_rank_corrected import b_kfac_c, b_r_c, b_r_kfac
from kfac_optax.methods.kfac.low_rank_presets import b_kfac, rs_kfac
from kfac_optax.methods.record import SHORT_CLIPPED, Method, Sizes


def _follows(d: int, s: Sizes) -> bool:
    # the rule of `low_rank_blocks`, for one factor
    return s.r + s.n < d


def _pairs(d: int, s: Sizes) -> int:
    """Eigenvectors, eigenvalues, and trace, rank in use, rest and damping of one factor."""
    # U [d, k], D [k], and four scalars
    kept = min(s.r, d)
    return kept * d + kept + 4


def _with_averages(s: Sizes) -> int:
    # a dense average beside what is kept of it
    return sum(d * d + _pairs(d, s) for d in (s.p, s.q))


def _without_averages(s: Sizes) -> int:
    """Of a factor that is followed online only the diagonal is kept."""
    return sum((d if _follows(d, s) else d * d) + _pairs(d, s) for d in (s.p, s.q))


# a rank below the widths: something is cut off
_SHORT = SHORT_CLIPPED | {"rank": 2}
_COMMON: dict[str, Any] = dict(
    kind="preconditioner", needs=frozenset({"gradient", "curvature"}), state=_with_averages
)
# each factor: the average, then eigenvectors, eigenvalues and four scalars
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
        # no average of a factor that is followed
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
