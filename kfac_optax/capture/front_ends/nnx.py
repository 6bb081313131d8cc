"""Flax NNX front end: calls of supported modules are wrapped while an estimator traces."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx

from kfac_optax.capture.front_ends import modules
from kfac_optax.capture.geometry import Dense
from kfac_optax.capture.tap import active, place

SUPPORTED = (
    "flax.nnx.Linear",
    "LinearGeneral",
    "Einsum",
    "Conv",
    "ConvTranspose",
    "Embed",
    "BatchNorm",
    "LayerNorm",
    "RMSNorm",
    "GroupNorm",
    "InstanceNorm",
)
_lock = threading.RLock()


def _linear(describe: Callable[..., modules.Described]) -> Callable[..., Any]:
    def handle(self, original, inputs, *args, out_sharding=None, **kwargs):
        # older modules do not know the argument
        sharding = {} if out_sharding is None else {"out_sharding": out_sharding}
        # what the layer sees as rows, and how it is a dense layer
        a, geometry = describe(self, inputs, *args, **kwargs)
        out = original(self, inputs, *args, **sharding, **kwargs)
        return _tap(self, out, a, geometry, "kernel", "bias")

    return handle


def _embed(self, original, inputs, *args, **kwargs):
    tokens, geometry = modules.embedding(self, inputs)
    out = original(self, inputs, *args, **kwargs)
    return _tap(self, out, tokens, geometry, "embedding")


def _attend(self, original, query, *args, **kwargs):
    out = original(self, query, *args, **kwargs)
    # logits = query E^T: a dense layer with the transposed table
    table = self.embedding[...]
    return place(out, query, table.T, geometry=Dense(), name=type(self).__name__)


def _norm(self, original, x, *args, **kwargs):
    geometry = modules.norm(self, x)
    if self.scale is None:
        # neither scale nor shift: nothing to measure
        if getattr(self, "bias", None) is None:
            return original(self, x, *args, **kwargs)
        out = original(self, x, *args, **kwargs)
        return _tap(self, out, jnp.ones_like(out), geometry, "bias")
    # the same normalisation once more without its parameters; compiled, both share mean and
    # variance
    with _without_parameters(self):
        a = original(self, x, *args, **kwargs)
    out = original(self, x, *args, **kwargs)
    return _tap(self, out, a, geometry, "scale", "bias")


@contextlib.contextmanager
def _without_parameters(module: Any) -> Iterator[None]:
    """A normalisation without scale and shift; running statistics are as before afterwards."""
    fields = vars(module)
    # taken out of the fields, not set by the module's own rules, and put back afterwards
    kept = {name: fields[name] for name in ("scale", "bias") if name in fields}
    running = {
        name: fields[name].get_raw_value()
        for name in ("mean", "var")
        if isinstance(fields.get(name), nnx.Variable)
    }
    try:
        for name in kept:
            object.__setattr__(module, name, None)
        yield
    finally:
        for name, value in kept.items():
            object.__setattr__(module, name, value)
        for name, value in running.items():
            if fields[name].get_raw_value() is not value:
                fields[name].set_raw_value(value)


def _tap(self, out, a, geometry, *names):
    # parameters as stored, those that the module has
    found = [getattr(self, name, None) for name in names]
    operands = [variable[...] for variable in found if variable is not None]
    return place(out, a, *operands, geometry=geometry, name=type(self).__name__)


_HANDLERS: dict[tuple[type, str], Callable[..., Any]] = {
    (nnx.Linear, "__call__"): _linear(modules.dense),
    (nnx.LinearGeneral, "__call__"): _linear(modules.dense_general),
    (nnx.Einsum, "__call__"): _linear(modules.einsum),
    (nnx.Conv, "__call__"): _linear(modules.conv),
    (nnx.ConvTranspose, "__call__"): _linear(modules.conv_transpose),
    (nnx.Embed, "__call__"): _embed,
    (nnx.Embed, "attend"): _attend,
} | {
    # all of these see a normalised input
    (cls, "__call__"): _norm
    for cls in (nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.InstanceNorm)
}


def _wrapped(original: Callable, handle: Callable[..., Any]) -> Callable:
    @functools.wraps(original)
    def call(self, *args, **kwargs):
        if not active():  # another thread's model, while this one traces
            return original(self, *args, **kwargs)
        return handle(self, original, *args, **kwargs)

    return call


@contextlib.contextmanager
def intercepting() -> Iterator[None]:
    """Context in which every supported NNX layer is tapped. NNX has no interceptors, hence the
    exchange.
    """
    with _lock:
        # classes are changed for all threads: one at a time, and put back whatever happens
        originals = {key: getattr(*key) for key in _HANDLERS}
        for (cls, name), handle in _HANDLERS.items():
            setattr(cls, name, _wrapped(originals[cls, name], handle))
        try:
            yield
        finally:
            for (cls, name), original in originals.items():
                setattr(cls, name, original)
