"""Seconds of factorisations and of products of the same size, and their ratio."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.parts import Case
from benchmarks.timing import compile_together, seconds_of
from kfac_optax.linalg.factorize import psd_eigh, psd_inverse
from kfac_optax.linalg.newton import newton_inverse

# size: matrices at once
SIZES = {64: (1, 64), 256: (1, 16), 512: (1, 8), 1024: (1, 8), 2048: (1,), 4096: (1,)}
SMALL = {8: (1, 2)}
PRODUCT = "matmul, highest"
SHIFT = 1e-2  # of a factor whose largest eigenvalue is about four


def factorisations(small: bool) -> Iterable[Case]:
    """Every way at every size, products first; ratios are to one product at full precision."""
    for size, counts in (SMALL if small else SIZES).items():
        for count in counts:
            yield from _cases(size, count)


def _cases(size: int, count: int) -> Iterable[Case]:
    key = jax.random.key(size)
    rows = jax.random.normal(key, (count, 2 * size, size))
    factor = jnp.einsum("cni,cnj->cij", rows, rows, precision="highest") / (2 * size)
    right = jax.random.normal(key, (count, size, size))
    # the inverse of a factor that has moved by a twentieth since the last refresh
    near = jax.jit(jax.vmap(functools.partial(psd_inverse, shift=jnp.float32(SHIFT))))
    start = near(factor + 0.05 * jnp.eye(size))
    arguments = (factor, right, start)
    ways = {name: jax.jit(jax.vmap(way)) for name, way in _ways().items()}
    programs = compile_together(
        {name: functools.partial(way.lower, *arguments) for name, way in ways.items()}
    )
    product: list[float] = []

    def measure(name: str) -> dict[str, float]:
        call = programs[name].result().call
        spent = seconds_of(lambda: call(*arguments))
        if name == PRODUCT:
            product.append(spent)
        return {"seconds": spent, "products": spent / product[0] if product else float("nan")}

    for name in ways:
        yield Case(f"{count} x {size}: {name}", functools.partial(measure, name))


def _ways() -> dict[str, Callable[..., Any]]:
    """`(factor, right-hand side, inverse to start from) -> anything`."""
    matmul = functools.partial(jnp.matmul, precision="highest")
    return {
        PRODUCT: lambda m, v, x: matmul(m, v),
        "matmul, default precision": lambda m, v, x: jnp.matmul(m, v),
        "cholesky": lambda m, v, x: jnp.linalg.cholesky(_shifted(m)),
        "cholesky and inverse": lambda m, v, x: psd_inverse(m, jnp.float32(SHIFT)),
        "cho_solve, square right-hand side": lambda m, v, x: jax.scipy.linalg.cho_solve(
            (jnp.linalg.cholesky(_shifted(m)), True), v
        ),
        "inverse by LU": lambda m, v, x: jnp.linalg.inv(_shifted(m)),
        "eigh": lambda m, v, x: psd_eigh(m),
        "qr": lambda m, v, x: jnp.linalg.qr(m),
        "newton until it is an inverse": lambda m, v, x: newton_inverse(m, jnp.float32(SHIFT), x),
        "newton, 1 iteration": lambda m, v, x: _newton(_shifted(m), x, 1),
        "newton, 5 iterations": lambda m, v, x: _newton(_shifted(m), x, 5),
    }


def _shifted(m: jax.Array) -> jax.Array:
    return m + SHIFT * jnp.eye(len(m), dtype=m.dtype)


def _newton(m: jax.Array, x: jax.Array, iterations: int) -> jax.Array:
    """`X <- X (2 I - M X)`, iterated from `x`."""
    matmul = functools.partial(jnp.matmul, precision="highest")
    for _ in range(iterations):
        x = 2 * x - matmul(x, matmul(m, x))
    return x
