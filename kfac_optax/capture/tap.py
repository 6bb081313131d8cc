"""The tap: an identity on a layer's output that carries the layer's input and parameters through tracing."""

import contextlib
from collections.abc import Iterator

import jax
from jax.extend import core as jex
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

# A context that JAX's caches know: a function jitted before, without taps, is traced anew inside the estimator,
# and a trace with taps never leaks into the user's own steps.
_tapping = jax.make_user_context(False)

tap_p = jex.Primitive("kfac_tap")
tap_p.def_impl(lambda s, *_, **__: s)
tap_p.def_abstract_eval(lambda s, *_, **__: s)
mlir.register_lowering(tap_p, lambda _, s, *__, **___: [s])
ad.primitive_jvps[tap_p] = lambda primals, tangents, **params: (tap_p.bind(*primals, **params), tangents[0])


def _batch(args, dims, *, stacked, **params):
    """Batched rows are rows; batched parameters are a stack of layers and move to the front together with them."""
    (size,) = {x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None}

    def front(x, d):
        return jax.numpy.broadcast_to(x, (size, *x.shape)) if d is None else jax.numpy.moveaxis(x, d, 0)

    if any(d is not None for d in dims[2:]):
        return tap_p.bind(*map(front, args, dims), stacked=stacked + 1, **params), 0
    if stacked == 0:
        s, a = (front(x, d) for x, d in zip(args[:2], dims[:2], strict=True))
        return tap_p.bind(s, a, *args[2:], stacked=0, **params), 0
    # rows batched inside a stack of layers: the new axis goes behind the stack
    s, a = (jax.numpy.moveaxis(front(x, d), 0, stacked) for x, d in zip(args[:2], dims[:2], strict=True))
    return tap_p.bind(s, a, *args[2:], stacked=stacked, **params), stacked


batching.primitive_batchers[tap_p] = _batch


def active() -> bool:
    """Whether an estimator is tracing; taps are placed only then."""
    return bool(_tapping.value)


@contextlib.contextmanager
def tapping() -> Iterator[None]:
    """Switches taps on while an estimator traces."""
    with _tapping(True):
        yield


def place(s: Array, a: Array, *params: Array, kind: str, name: str) -> Array:
    """Binds the tap; front ends call this once they know that `s` is the output of a supported layer."""
    return tap_p.bind(s, a, *params, kind=kind, name=name, stacked=0)


def tap_dense(
    s: Float[Array, "*batch q"],
    a: Float[Array, "*batch p"],
    kernel: Float[Array, "p q"],
    bias: Float[Array, " q"] | None = None,
    *,
    name: str = "",
) -> Float[Array, "*batch q"]:
    """Marks `s = a @ kernel + bias` as a dense layer, for Equinox, Haiku and plain JAX models.

    An identity: returns `s`. Outside an estimator it does nothing at all.

    Args:
      s: output of the layer, `[*batch, q]`. Use the returned value in place of it.
      a: input of the layer, `[*batch, p]`.
      kernel: the weight **parameter**, `[p, q]` (pass `weight.T` where it is stored transposed).
      bias: the bias parameter `[q]`, if the layer has one.
      name: shown in errors.

    Returns:
      `s`.

    Raises:
      ValueError: the shapes do not belong together.

    >>> import jax.numpy as jnp
    >>> x, w = jnp.ones((4, 3)), jnp.ones((3, 2))
    >>> print(tap_dense(x @ w, x, w).shape)
    (4, 2)
    """
    label = f"tap_dense{f' {name!r}' if name else ''}"
    if kernel.ndim != 2 or a.shape[-1:] != kernel.shape[:1] or s.shape[-1:] != kernel.shape[1:]:
        raise ValueError(
            f"{label}: got s {s.shape}, a {a.shape}, kernel {kernel.shape}; expected s [*batch, q], a [*batch, p] and "
            "kernel [p, q]. Pass the kernel so that s = a @ kernel (+ bias)."
        )
    if s.shape[:-1] != a.shape[:-1]:
        raise ValueError(f"{label}: leading axes of s {s.shape} and a {a.shape} differ; expected the same rows.")
    if bias is not None and bias.shape != kernel.shape[1:]:
        raise ValueError(f"{label}: got bias {bias.shape}; expected {kernel.shape[1:]}, one value per output.")
    if not active():
        return s
    return place(s, a, kernel, *(() if bias is None else (bias,)), kind="dense", name=name)
