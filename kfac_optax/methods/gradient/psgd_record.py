"""Records of PSGD."""

from kfac_optax.methods.gradient.psgd_kron import psgd_kron
from kfac_optax.methods.gradient.psgd_lra import psgd_lra
from kfac_optax.methods.record import Method, Sizes


def _numbers(sizes: Sizes) -> int:
    """Kernel `[m, q]` with two triangular factors, a bias with a diagonal, and the mean gradient."""
    m = sizes.p - sizes.bias
    return m**2 + sizes.q**2 + sizes.bias * sizes.q + sizes.p * sizes.q


RECORDS = (
    Method(
        name="psgd_kron",
        kind="preconditioner",
        summary="a Kronecker product of triangular factors that learns to whiten the gradients, "
        "without roots and inverses; gradients alone",
        paper="Li (2015, 2018)",
        equation="U = Qᵀ Q m, Q ← Q - μ triu(S - T) Q / |S + T|, Q = Q₁ ⊗ … ⊗ Q_k",
        needs=frozenset({"gradient"}),
        state=_numbers,
        state_text="p² + q² + p q (of the kernel; 2 q of the bias)",
        cost=("O(d³)", "O(d³)"),
        test="tests/methods/test_psgd.py::test_the_kronecker_step_is_dense",
        build=lambda layers, **options: psgd_kron(**options),
        block_of=None,
        across=lambda layers: 2,  # the bits of the key
    ),
    Method(
        name="psgd_lra",
        kind="preconditioner",
        summary="a diagonal and a matrix of low rank over all parameters that learn to whiten the "
        "gradients, without roots and inverses; gradients alone",
        paper="Li (2015, 2018)",
        equation="U = Qᵀ Q m, Q = (I + U Vᵀ) diag(d)",
        needs=frozenset({"gradient"}),
        state=lambda sizes: (2 * sizes.r + 2) * sizes.p * sizes.q,
        state_text="(2 r + 2) p q",
        cost=("O(r D + r³) for D parameters", "O(r D)"),
        test="tests/methods/test_psgd_lra.py::test_steps_are_those_of_the_criterion",
        build=lambda layers, **options: psgd_lra(**(dict(rank=2) | options)),
        block_of=None,
        across=lambda layers: 2,  # the bits of the key
    ),
)
