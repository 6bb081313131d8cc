"""Flax linen front end: taps placed by method interception, the user's model unchanged."""

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import meta

from kfac_optax.capture.front_ends import modules
from kfac_optax.capture.geometry import Dense
from kfac_optax.capture.tap import place

SUPPORTED = (
    "flax.linen.Dense",
    "DenseGeneral",
    "Einsum",
    "Conv",
    "ConvTranspose",
    "Embed",
    "BatchNorm",
    "LayerNorm",
    "RMSNorm",
    "GroupNorm",
    "InstanceNorm",
    "OptimizedLSTMCell",
)


def _linear(describe: Callable[..., modules.Described]) -> Callable[..., Any]:
    def handle(module, next_fun, params, inputs, *args, **kwargs):
        # what the layer sees as rows, and how it is a dense layer
        a, geometry = describe(module, inputs, *args, **kwargs)
        out = next_fun(inputs, *args, **kwargs)
        return _tap(module, out, a, geometry, params, "kernel", "bias")

    return handle


def _embed(module, next_fun, params, inputs):
    tokens, geometry = modules.embedding(module, inputs)
    return _tap(module, next_fun(inputs), tokens, geometry, params, "embedding")


def _attend(module, next_fun, params, query):
    # logits = query E^T: a dense layer with the transposed table
    out, table = next_fun(query), params["embedding"]
    return place(out, query, table.T, geometry=Dense(), name=_name(module))


def _norm(module, next_fun, params, x, *args, **kwargs):
    out = next_fun(x, *args, **kwargs)
    geometry = modules.norm(module, x)
    if "scale" not in params:
        return _tap(module, out, jnp.ones_like(out), geometry, params, "bias")
    # the same normalisation once more without its parameters; compiled, both share mean and
    # variance
    bare = {"use_scale": False}
    if hasattr(module, "use_bias"):
        bare["use_bias"] = False
    # batch statistics are read, and what is written to them is dropped
    written = "batch_stats"
    statistics = {k: v for k, v in module.variables.items() if k == written}
    plain = module.clone(parent=None, name=None, **bare)
    a, _ = plain.apply(statistics, x, *args, mutable=[written], **kwargs)
    return _tap(module, out, a, geometry, params, "scale", "bias")


_OF_LSTM = (
    "features",
    "gate_fn",
    "activation_fn",
    "kernel_init",
    "recurrent_kernel_init",
    "bias_init",
    "dtype",
    "param_dtype",
    "carry_init",
)


def _lstm(module, next_fun, params, carry, inputs):
    """Its gates are one product of concatenated weights; the plain cell with the same parameters
    has a layer for each.
    """
    settings = {name: getattr(module, name) for name in _OF_LSTM}
    cell = nn.LSTMCell(**settings, parent=None)
    return cell.apply({"params": params}, carry, inputs)


def _tap(module, out, a, geometry, params, *names):
    operands = [params[name] for name in names if name in params]
    return place(out, a, *operands, geometry=geometry, name=_name(module))


def _name(module: nn.Module) -> str:
    return "/".join(module.path)


_HANDLERS: dict[Callable, tuple[str, Callable[..., Any]]] = {
    inspect.unwrap(nn.Dense.__call__): ("kernel", _linear(modules.dense)),
    inspect.unwrap(nn.DenseGeneral.__call__): ("kernel", _linear(modules.dense_general)),
    inspect.unwrap(nn.Einsum.__call__): ("kernel", _linear(modules.einsum)),
    inspect.unwrap(nn.Conv.__call__): ("kernel", _linear(modules.conv)),
    inspect.unwrap(nn.ConvTranspose.__call__): ("kernel", _linear(modules.conv_transpose)),
    inspect.unwrap(nn.Embed.__call__): ("embedding", _embed),
    inspect.unwrap(nn.Embed.attend): ("embedding", _attend),
    inspect.unwrap(nn.OptimizedLSTMCell.__call__): ("", _lstm),
} | {
    inspect.unwrap(cls.__call__): ("", _norm)
    for cls in (nn.BatchNorm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm)
}


def _intercept(next_fun, args, kwargs, context):
    # Compared by function, not by class: a subclass with its own __call__ is tapped where it calls
    # that of its base.
    method: Any = getattr(context.orig_method, "func", None)
    if method not in _HANDLERS:
        return next_fun(*args, **kwargs)
    needed, handle = _HANDLERS[method]
    params = meta.unbox(context.module.variables.get("params", {}))
    # without parameters, or while the module is being initialised
    complete = not needed or needed in params
    if not params or not complete:
        return next_fun(*args, **kwargs)
    return handle(context.module, next_fun, params, *args, **kwargs)


def intercepting() -> contextlib.AbstractContextManager[None]:
    """Context in which every supported linen layer is tapped."""
    return nn.intercept_methods(_intercept)
