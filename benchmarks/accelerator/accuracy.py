"""Kronecker factors, their inverses and the preconditioned gradient against double precision."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.parts import Case
from benchmarks.timing import seconds_of
from kfac_optax.linalg.factorize import psd_eigh, psd_inverse
from kfac_optax.linalg.gram import gram
from kfac_optax.linalg.kronecker_products import eigen_solve, sandwich

DAMPING = 1e-3
DECAY = 1.5  # eigenvalue k of a factor is proportional to k^-DECAY
# precision of the statistics and of the solves; "tensorfloat32" is JAX's "high"
LEVELS = (
    ("highest", "highest"),
    ("default", "default"),
    ("tensorfloat32", "tensorfloat32"),
    ("tensorfloat32", "highest"),
    ("highest", "tensorfloat32"),
    ("TF32_TF32_F32", "TF32_TF32_F32"),
    ("TF32_TF32_F32_X3", "TF32_TF32_F32_X3"),
    ("BF16_BF16_F32_X3", "BF16_BF16_F32_X3"),
)


def accuracy(small: bool) -> Iterable[Case]:
    """Relative errors at every precision and size."""
    for size in (16,) if small else (256, 1024):
        known = _reference(size)
        yield Case(f"{size}: condition numbers", lambda known=known: known["conditions"])
        for statistics, solves in LEVELS[:3] if small else LEVELS:
            name = f"{size}: {statistics} / {solves}"
            yield Case(name, lambda k=known, a=statistics, b=solves: _errors(k, a, b))


def model_precision(small: bool) -> Iterable[Case]:
    """A product that says nothing about its precision, under `jax.default_matmul_precision`."""
    size = 32 if small else 1024
    x, y = (np.random.default_rng(i).normal(size=(size, size)) for i in range(2))
    single = tuple(jnp.asarray(m, jnp.float32) for m in (x, y))
    for level in (None, "tensorfloat32", "float32", "highest"):

        def measure(level: Any = level) -> dict[str, float]:
            with jax.default_matmul_precision(level):
                product = jax.jit(jnp.matmul).lower(*single).compile()
            error = _error(product(*single), x @ y)
            return {"product": error, "seconds": seconds_of(lambda: product(*single))}

        yield Case(f"{size}: default_matmul_precision({level})", measure)


def _rows(size: int, mean: float, seed: int) -> np.ndarray:
    """Rows `[2 size, size]` of a layer: decaying eigenvalues, with this mean, in a random basis."""
    rng = np.random.default_rng(seed)
    values = np.arange(1, size + 1) ** -DECAY
    basis, _ = np.linalg.qr(rng.normal(size=(size, size)))
    scale = np.sqrt(values / values.mean() * mean)
    rows = (rng.normal(size=(2 * size, size)) * scale) @ basis.T
    # single precision holds them exactly, so that both sides start from the same numbers
    return rows.astype(np.float32).astype(np.float64)


def _reference(size: int) -> dict[str, Any]:
    """Everything in NumPy's double precision."""
    a, g = _rows(size, 1.0, 0), _rows(size, 1 / size, 1)
    v = np.random.default_rng(2).normal(size=(size, size)).astype(np.float32).astype(np.float64)
    factors = [x.T @ x / len(x) for x in (a, g)]
    # factored Tikhonov damping: pi sqrt(damping) and sqrt(damping) / pi
    pi = np.sqrt(np.trace(factors[0]) / np.trace(factors[1]))
    shifts = [pi * np.sqrt(DAMPING), np.sqrt(DAMPING) / pi]
    inverses = [np.linalg.inv(m + s * np.eye(size)) for m, s in zip(factors, shifts)]
    (s_a, u_a), (s_g, u_g) = map(np.linalg.eigh, factors)
    exact = u_a @ (u_a.T @ v @ u_g / (np.outer(s_a, s_g) + DAMPING)) @ u_g.T
    conditions = {
        name: float((values[-1] + shift) / (values[0] + shift))
        for name, values, shift in (("A", s_a, shifts[0]), ("G", s_g, shifts[1]))
    } | {"A x G": float((s_a[-1] * s_g[-1] + DAMPING) / (s_a[0] * s_g[0] + DAMPING))}
    return {
        "rows": (a, g, v),
        "shifts": shifts,
        "factors": factors,
        "inverses": inverses,
        "factored": inverses[0] @ v @ inverses[1],
        "exact": exact,
        "conditions": conditions,
    }


def _errors(known: dict[str, Any], statistics: str, solves: str) -> dict[str, float]:
    a, g, v = (jnp.asarray(x, jnp.float32) for x in known["rows"])
    shifts = [jnp.float32(s) for s in known["shifts"]]

    @jax.jit
    def factors_of(a: jax.Array, g: jax.Array) -> list[jax.Array]:
        return [gram(x, x, precision=statistics) / len(x) for x in (a, g)]

    @jax.jit
    def solved(factors: list[jax.Array], v: jax.Array) -> tuple:
        inverses = [psd_inverse(m, s) for m, s in zip(factors, shifts)]
        eigen = [psd_eigh(m) for m in factors]
        factored = sandwich(inverses[0], v, inverses[1], precision=solves)
        exact = eigen_solve(*eigen, v, jnp.float32(DAMPING), precision=solves)
        return inverses, factored, exact

    factors = factors_of(a, g)
    inverses, factored, exact = solved(factors, v)
    return {
        "A": _error(factors[0], known["factors"][0]),
        "G": _error(factors[1], known["factors"][1]),
        "inverse of A": _error(inverses[0], known["inverses"][0]),
        "inverse of G": _error(inverses[1], known["inverses"][1]),
        "update, cholesky": _error(factored, known["factored"]),
        "update, eigh": _error(exact, known["exact"]),
        "statistics, seconds": seconds_of(lambda: factors_of(a, g)),
    }


def _error(got: Any, expected: np.ndarray) -> float:
    """Relative distance in the Frobenius norm."""
    return float(np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected))
