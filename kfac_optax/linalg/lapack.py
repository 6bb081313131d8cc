"""Factorisations and solves by LAPACK, of one matrix or of a stack `[..., n, n]`.

Where a process has several CPU devices they take the matrices of a stack one at a time. JAX 0.10
spreads a stack over the threads of XLA, which all devices of a process share, and waits for them on
a thread of their own: as many waiting devices as there are threads wait for ever. One matrix waits
for nobody.

Everywhere else these are JAX's own calls. Derivatives are so everywhere: mapped ones take stacks.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int


def cholesky(
    matrix: Float[Array, "*k n n"], *, symmetrize_input: bool = True
) -> Float[Array, "*k n n"]:
    """Lower `L` with `L L^T = M`, as `jnp.linalg.cholesky`; NaN where `M` is not positive definite.

    >>> print(cholesky(jnp.array([[4.0, 2.0], [2.0, 2.0]])))
    [[2. 0.]
     [1. 1.]]
    """
    call = functools.partial(jnp.linalg.cholesky, symmetrize_input=symmetrize_input)
    return _one_at_a_time(call, matrix)


def eigh(
    matrix: Float[Array, "*k n n"], *, symmetrize_input: bool = True
) -> tuple[Float[Array, "*k n"], Float[Array, "*k n n"]]:
    """Rising eigenvalues and eigenvectors of symmetric matrices, as `jnp.linalg.eigh`.

    >>> values, vectors = eigh(jnp.diag(jnp.array([2.0, 1.0])))
    >>> print(values)
    [1. 2.]
    """
    call = functools.partial(jnp.linalg.eigh, symmetrize_input=symmetrize_input)
    values, vectors = _one_at_a_time(call, matrix)
    return values, vectors


def eigvalsh(matrix: Float[Array, "*k n n"]) -> Float[Array, "*k n"]:
    """Rising eigenvalues of symmetric matrices, as `jnp.linalg.eigvalsh`.

    >>> print(eigvalsh(jnp.diag(jnp.array([2.0, 1.0]))))
    [1. 2.]
    """
    return _one_at_a_time(jnp.linalg.eigvalsh, matrix)


def qr(matrix: Float[Array, "*k m n"]) -> tuple[Float[Array, "*k m r"], Float[Array, "*k r n"]]:
    """`Q R = M` with `r = min(m, n)` orthonormal columns in `Q`, as `jnp.linalg.qr`.

    >>> basis, triangle = qr(jnp.array([[3.0], [4.0]]))
    >>> print([f"{x:.1f}" for x in (basis @ triangle).ravel()], basis.shape)
    ['3.0', '4.0'] (2, 1)
    """
    basis, triangle = _one_at_a_time(jnp.linalg.qr, matrix)
    return basis, triangle


def svd(
    matrix: Float[Array, "*k m n"],
) -> tuple[Float[Array, "*k m m"], Float[Array, "*k r"], Float[Array, "*k n n"]]:
    """`U, s, V^T` with `U diag(s) V^T = M`, singular values falling, as `jnp.linalg.svd`.

    >>> left, values, right = svd(jnp.diag(jnp.array([1.0, 2.0])))
    >>> print(values)
    [2. 1.]
    """
    left, values, right = _one_at_a_time(jnp.linalg.svd, matrix)
    return left, values, right


def slogdet(matrix: Float[Array, "*k n n"]) -> tuple[Float[Array, "*k"], Float[Array, "*k"]]:
    """Sign and `log |det M|`, as `jnp.linalg.slogdet`.

    >>> sign, logdet = slogdet(-jnp.eye(1))
    >>> print(sign, logdet)
    -1.0 0.0
    """
    sign, logdet = _one_at_a_time(jnp.linalg.slogdet, matrix)
    return sign, logdet


def solve(matrix: Float[Array, "*k n n"], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """`M^{-1} b`, as `jnp.linalg.solve`.

    >>> print(solve(2 * jnp.eye(2), jnp.array([2.0, 4.0])))
    [1. 2.]
    """
    return _one_at_a_time(jnp.linalg.solve, matrix, b)


def solve_triangular(
    matrix: Float[Array, "*k n n"],
    b: Float[Array, "..."],
    *,
    trans: int = 0,
    lower: bool = False,
) -> Float[Array, "..."]:
    """`T^{-1} b`, with `trans=1` `T^{-T} b`, as `jax.scipy.linalg.solve_triangular`.

    >>> lower = jnp.array([[1.0, 0.0], [1.0, 2.0]])
    >>> print(solve_triangular(lower, jnp.array([1.0, 5.0]), lower=True))
    [1. 2.]
    """
    call = functools.partial(jax.scipy.linalg.solve_triangular, trans=trans, lower=lower)
    return _one_at_a_time(call, matrix, b)


def cho_solve(lower: Float[Array, "*k n n"], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """`(L L^T)^{-1} b`, as `jax.scipy.linalg.cho_solve`.

    >>> print(cho_solve(2 * jnp.eye(2), jnp.array([4.0, 8.0])))
    [1. 2.]
    """

    def call(lower: jax.Array, b: jax.Array) -> jax.Array:
        return jax.scipy.linalg.cho_solve((lower, True), b)

    return _one_at_a_time(call, lower, b)


def lu_factor(matrix: Float[Array, "*k n n"]) -> tuple[Float[Array, "*k n n"], Int[Array, "*k n"]]:
    """Both triangles of `P L U = M` in one array, and pivots, as `jax.scipy.linalg.lu_factor`.

    >>> factors, pivots = lu_factor(jnp.array([[0.0, 1.0], [2.0, 0.0]]))
    >>> print(pivots)
    [1 1]
    """
    factors, pivots = _one_at_a_time(jax.scipy.linalg.lu_factor, matrix)
    return factors, pivots


def lu_solve(
    factors: Float[Array, "*k n n"],
    pivots: Int[Array, "*k n"],
    b: Float[Array, "..."],
    *,
    trans: int = 0,
) -> Float[Array, "..."]:
    """`M^{-1} b`, with `trans=1` `M^{-T} b`, as `jax.scipy.linalg.lu_solve`.

    >>> print(lu_solve(*lu_factor(2 * jnp.eye(2)), jnp.array([2.0, 4.0])))
    [1. 2.]
    """

    def call(factors: jax.Array, pivots: jax.Array, b: jax.Array) -> jax.Array:
        return jax.scipy.linalg.lu_solve((factors, pivots), b, trans=trans)

    return _one_at_a_time(call, factors, pivots, b)


def several_devices() -> bool:
    """Whether this process has more than one CPU device, so that their programs share threads.

    >>> print(several_devices())
    False
    """
    try:
        return len(jax.local_devices(backend="cpu")) > 1
    except RuntimeError:
        # no CPU among the platforms
        return False


def _one_at_a_time(call: Callable[..., Any], *stacks: jax.Array) -> Any:
    """`call` of stacks, the first one of matrices; of one matrix at a time on several devices."""
    if not several_devices():
        return call(*stacks)
    single = _unstacked(call)
    # axes in front of those of a matrix
    for _ in stacks[0].shape[:-2]:
        single = jax.vmap(single)
    return single(*stacks)


def _unstacked(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` that is repeated where `vmap` would stack its arguments."""

    # without words of its own, whose defaults would count as arguments
    @custom_vmap
    def looped(*args: jax.Array) -> Any:
        return call(*args)

    @looped.def_vmap
    def repeated(size: int, batched: list[bool], *args: jax.Array) -> tuple[Any, Any]:
        del size
        stacked = [x for x, among in zip(args, batched, strict=True) if among]
        same = [x for x, among in zip(args, batched, strict=True) if not among]
        results = _repeated(looped, batched, stacked, same)
        return results, jax.tree.map(lambda _: True, results)

    # a custom batching rule has no transpose, so derivatives are those of the call itself
    unstacked = jax.custom_jvp(looped)

    @unstacked.defjvp
    def derivative(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
        return jax.jvp(call, primals, tangents)

    return unstacked


def _repeated(
    call: Callable[..., Any],
    batched: list[bool],
    stacked: list[jax.Array],
    same: list[jax.Array],
) -> Any:
    """`call` of each entry along axis 0 of what is stacked, with the rest the same for all."""

    def loop(stacked: list[jax.Array], same: list[jax.Array]) -> Any:
        def one(entries: list[jax.Array]) -> Any:
            of_stack, others = iter(entries), iter(same)
            return call(*(next(of_stack if among else others) for among in batched))

        return jax.lax.map(one, stacked)

    axis = _explicit_axis(stacked[0])
    if axis is None:
        return loop(stacked, same)
    # explicit mesh axes: every device repeats over its own part
    names = axis if isinstance(axis, tuple) else (axis,)
    mapped = jax.shard_map(loop, in_specs=(P(axis), P()), out_specs=P(axis), axis_names=set(names))
    return mapped(stacked, same)


def _explicit_axis(x: jax.Array) -> Any:
    """Mesh axes over which axis 0 is divided, where the type says so."""
    sharding: Any = jax.typeof(x).sharding
    return sharding.spec[0]
