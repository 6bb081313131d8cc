"""Operations of a step, as XLA counts them in the compiled program, beside those of SGD; nothing is
run.

Of a branch the larger side is counted. Custom calls (factorisations on a CPU) count nothing.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

import kfac_optax as ko
from benchmarks import networks

WIDTHS, EXAMPLES = (1000, 500, 250, 100, 30), 256
# None: the traced schedule
PLAIN = {"measure": False, "refresh": False}
MEASURED = {"measure": True, "refresh": False}
NO_DAMPING = {"adapt": False}


class Counter:
    """Steps of one network, compiled with their curvature from a pass of its own, or shared."""

    def __init__(self, network: networks.Network):
        self.params, self.x = network.variables["params"], network.x
        self.predict = lambda params, x: network.apply(params, {}, x)[0]
        self.fisher = ko.fisher(self.predict)
        self.layers = self.fisher.layers(self.params, self.x)

    def loss(self, params: Any, x: jax.Array) -> jax.Array:
        return self.predict(params, x).mean_nll(x)

    def _pieces(self, shared: bool, params: Any, x: jax.Array, key: jax.Array) -> tuple:
        if shared:
            step = self.fisher.value_and_grad(lambda out, targets: out.mean_nll(targets))
            return step(params, x, targets=x, key=key)
        value, grads = jax.value_and_grad(self.loss)(params, x)
        return value, grads, self.fisher.at(params, x, key=key)

    def step(self, tx: Any, due: dict[str, bool] | None = None, shared: bool = False) -> float:
        """Operations of a step; `due` without curvature for an optimizer of gradients."""
        tx = optax.with_extra_args_support(tx)

        def step(params: Any, state: Any, x: jax.Array, key: jax.Array) -> tuple:
            value, grads, curvature = self._pieces(shared, params, x, key)
            extra: dict[str, Any] = {}
            if due is not None:
                value_fn = lambda p: self.loss(p, x)
                extra = dict(due, curvature=curvature, value=value, value_fn=value_fn)
            updates, state = tx.update(grads, state, params, **extra)
            return optax.apply_updates(params, updates), state, value

        state = jax.eval_shape(tx.init, self.params)
        return operations(step, self.params, state, self.x, jax.random.key(0))


def operations(function: Callable[..., Any], *args: Any) -> float:
    """Floating-point operations of the compiled function."""
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def measure(small: bool) -> dict[str, dict[str, float]]:
    """Rows of the table."""
    size = (16, 12, (8, 3)) if small else (EXAMPLES, 784, WIDTHS)
    counter = Counter(networks.autoencoder(*size))
    layers = counter.layers
    sgd = optax.sgd(1e-3, momentum=0.9)
    kfac = optax.chain(ko.kfac(layers, learning_rate=1e-3, inverse="cholesky"), sgd)
    adaptive = ko.kfac_adaptive(layers)
    base = counter.step(sgd)
    counts = {
        "SGD": base,
        "the loss alone": operations(counter.loss, counter.params, counter.x),
        "kfac, plain": counter.step(kfac, PLAIN),
        "kfac, with statistics": counter.step(kfac, MEASURED),
        "kfac_adaptive, plain": counter.step(adaptive, PLAIN | NO_DAMPING),
        "kfac_adaptive, with statistics": counter.step(adaptive, MEASURED | NO_DAMPING),
        "kfac, traced schedule": counter.step(kfac, {}),
        "kfac, traced schedule, value_and_grad": counter.step(kfac, {}, shared=True),
    }
    return {name: {"operations": n, "/ SGD": n / base} for name, n in counts.items()}
