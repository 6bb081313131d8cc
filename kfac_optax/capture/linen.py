"""Flax linen front end: taps placed by method interception, the user's model unchanged."""

import contextlib
import inspect

import flax.linen as nn
from flax.core import meta

from kfac_optax.capture.tap import place

SUPPORTED = ("flax.linen.Dense",)
_DENSE_CALL = inspect.unwrap(nn.Dense.__call__)


def _intercept(next_fun, args, kwargs, context):
    out = next_fun(*args, **kwargs)
    # Compared by function, not by class: a subclass with its own __call__ is tapped where it calls Dense's.
    if getattr(context.orig_method, "func", None) is not _DENSE_CALL:
        return out
    module = context.module
    params = meta.unbox(module.variables.get("params", {}))
    if "kernel" not in params:  # e.g. while the module is being initialised
        return out
    inputs = args[0] if args else kwargs["inputs"]
    operands = [params["kernel"]] + ([params["bias"]] if "bias" in params else [])
    return place(out, inputs, *operands, kind="dense", name="/".join(module.path))


def intercepting() -> contextlib.AbstractContextManager[None]:
    """Context in which every supported linen layer is tapped."""
    return nn.intercept_methods(_intercept)
