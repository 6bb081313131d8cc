"""Flax NNX front end: calls of supported modules are wrapped while an estimator traces."""

import contextlib
import functools
import threading
from collections.abc import Iterator

from flax import nnx

from kfac_optax.capture.tap import active, place

SUPPORTED = ("flax.nnx.Linear",)
_lock = threading.RLock()


def _wrap_linear(original):
    @functools.wraps(original)
    def call(self, inputs, *args, **kwargs):
        out = original(self, inputs, *args, **kwargs)
        if not active():  # another thread's model, while this one traces
            return out
        operands = [self.kernel[...]] + ([self.bias[...]] if self.bias is not None else [])
        return place(out, inputs, *operands, kind="dense", name=type(self).__name__)

    return call


@contextlib.contextmanager
def intercepting() -> Iterator[None]:
    """Context in which every supported NNX layer is tapped. NNX has no interceptors, hence the exchange."""
    with _lock:
        original = nnx.Linear.__call__
        nnx.Linear.__call__ = _wrap_linear(original)
        try:
            yield
        finally:
            nnx.Linear.__call__ = original
