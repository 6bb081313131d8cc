"""The tap: an identity on a layer's output that carries the layer's input and parameters through
tracing.
"""

import contextlib
from collections.abc import Iterator

import jax
from jax.extend import core as jex
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from kfac_optax.capture.geometry import Geometry

# A context that JAX's caches know: a function jitted before, without taps, is traced anew inside
# the estimator, and a trace with taps never leaks into the user's own steps.
_tapping = jax.make_user_context(False)

tap_p = jex.Primitive("kfac_tap")
# operands are (s, a, *parameters): the identity in s; what else it carries is only looked at
tap_p.def_impl(lambda s, *_, **__: s)
tap_p.def_abstract_eval(lambda s, *_, **__: s)
mlir.register_lowering(tap_p, lambda _, s, *__, **___: [s])


def _jvp(primals, tangents, **params):
    return tap_p.bind(*primals, **params), tangents[0]


def _transpose(cotangent, _, *rest, **__):
    nothing = [None] * len(rest)
    return [cotangent, *nothing]


ad.primitive_jvps[tap_p] = _jvp
ad.primitive_transposes[tap_p] = _transpose


def _batch(args, dims, *, stacked, **params):
    """Batched rows are rows; batched parameters are a stack of layers and move to the front
    together with them.
    """
    batched = [(x, d) for x, d in zip(args, dims, strict=True) if d is not None]
    (size,) = {x.shape[d] for x, d in batched}

    def front(x, d):
        if d is None:
            return jax.numpy.broadcast_to(x, (size, *x.shape))
        return jax.numpy.moveaxis(x, d, 0)

    of_parameters = dims[2:]
    if any(d is not None for d in of_parameters):
        stack = map(front, args, dims)
        return tap_p.bind(*stack, stacked=stacked + 1, **params), 0
    # rows batched inside a stack of layers: the new axis goes behind the stack
    s, a, *parameters = args
    s = jax.numpy.moveaxis(front(s, dims[0]), 0, stacked)
    a = jax.numpy.moveaxis(front(a, dims[1]), 0, stacked)
    return tap_p.bind(s, a, *parameters, stacked=stacked, **params), stacked


batching.primitive_batchers[tap_p] = _batch


def active() -> bool:
    """Whether an estimator is tracing; taps are placed only then."""
    return bool(_tapping.value)


@contextlib.contextmanager
def tapping() -> Iterator[None]:
    """Switches taps on while an estimator traces."""
    with _tapping(True):
        yield


def place(
    s: Array,
    a: Array,
    *params: Array,
    geometry: Geometry,
    name: str,
) -> Array:
    """Binds the tap; front ends call this once they know that `s` is the output of a supported
    layer.
    """
    # whose parameters they are is found out from the operands
    return tap_p.bind(
        s,
        a,
        *params,
        geometry=geometry,
        name=name,
        stacked=0,
        origins=(),
        kernel=(),
    )
