"""What a preconditioner or a whole optimizer owes its caller."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kfac_optax._types import PyTree


class Trial(NamedTuple):
    """A transformation, and a problem to run it on.

    Attributes:
      name: for messages.
      tx: the transformation; short periods let a few steps see every branch.
      params: where it starts.
      arguments: `(params, scale) -> (gradient, arguments of update by name)`, all of them those of
        a batch whose inputs are multiplied with `scale`: 0 and NaN make a batch of zeros and a
        broken one.
    """

    name: str
    tx: optax.GradientTransformation
    params: PyTree
    arguments: Callable[[PyTree, jax.Array], tuple[PyTree, dict[str, Any]]]


def check_transformation(trial: Trial) -> None:
    """All laws of a transformation.

    Raises:
      AssertionError: a law does not hold.

    >>> import kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.ones((2, 1)), jnp.eye(2)
    >>> loss = lambda w, x: estimator.spec.function(w, x).mean_nll(jnp.ones((2, 1)))
    >>> def arguments(w, scale):
    ...     return jax.grad(loss)(w, scale * x), {"curvature": estimator.at(w, scale * x)}
    >>> tx = ko.kfac(estimator.layers(w, x), learning_rate=1.0, curvature_every=1, inverse_every=1)
    >>> check_transformation(Trial("kfac", tx, w, arguments))
    """
    # compiled once for all laws
    step = _Compiled(trial)
    start = jax.jit(trial.tx.init)(trial.params)
    _check_steps(trial, step, start)
    _check_zero_batch(trial, step, start)
    _check_broken_batch(trial, step, start)
    _check_checkpoint(trial, step, start)


def check_steps(trial: Trial) -> None:
    """Structure, shapes, dtypes and weak types of the state stay as `init` made them, updates are
    like parameters, all is finite, and nothing compiles twice.
    """
    _check_steps(trial, _Compiled(trial), jax.jit(trial.tx.init)(trial.params))


def check_zero_batch(trial: Trial) -> None:
    """A batch of zeros leaves state and update finite."""
    _check_zero_batch(trial, _Compiled(trial), jax.jit(trial.tx.init)(trial.params))


def check_broken_batch(trial: Trial) -> None:
    """A batch of NaN gives an update of zeros, and a state from which good batches go on."""
    _check_broken_batch(trial, _Compiled(trial), jax.jit(trial.tx.init)(trial.params))


def check_checkpoint(trial: Trial) -> None:
    """A state that went through a list of numpy arrays goes on as the one it was made of."""
    _check_checkpoint(trial, _Compiled(trial), jax.jit(trial.tx.init)(trial.params))


class _Compiled:
    """One step of a trial, compiled, and how often it was traced."""

    def __init__(self, trial: Trial):
        tx = optax.with_extra_args_support(trial.tx)
        self.traces = 0

        def step(
            params: PyTree,
            state: PyTree,
            scale: jax.Array,
        ) -> tuple[PyTree, PyTree]:
            # runs when the step is traced only; sizes of JAX's caches are no public number
            # a second trace would mean that something has changed its type
            self.traces += 1
            gradient, more = trial.arguments(params, scale)
            return tx.update(gradient, state, params, **more)

        self._step = jax.jit(step)

    def __call__(
        self,
        params: PyTree,
        state: PyTree,
        scale: jax.Array,
    ) -> tuple[PyTree, PyTree]:
        return self._step(params, state, scale)


def _check_steps(trial: Trial, step: Any, start: PyTree) -> None:
    # a few steps: a first one may differ from those behind it
    params, state, one = trial.params, start, jnp.float32(1)
    expected = _kinds(start)
    weak = [path for path, (_, _, is_weak) in expected.items() if is_weak]
    _holds(trial, "init makes no weak types", not weak, f"weak: {weak}")
    for number in range(3):
        updates, state = step(params, state, one)
        got = _kinds(state)
        # where another type, shape or structure would be compiled again
        changed = {path: kind for path, kind in got.items() if expected.get(path) != kind}
        same = not changed and got.keys() == expected.keys()
        law = "the state keeps its structure, shapes and dtypes"
        _holds(trial, law, same, f"changed in step {number}: {changed or got.keys()}")
        like = _kinds(updates) == _kinds(params)
        _holds(trial, "updates are like parameters", like, f"got {_kinds(updates)}")
        _finite(trial, f"step {number}", (updates, state), like=start)
        # small steps, so that the problem stays what it is
        params = optax.apply_updates(params, jax.tree.map(lambda u: -0.01 * u, updates))
    _holds(trial, "one trace serves all steps", step.traces == 1, f"{step.traces} traces")


def _check_zero_batch(trial: Trial, step: Any, start: PyTree) -> None:
    result = step(trial.params, start, jnp.float32(0))
    _finite(trial, "after a batch of zeros", result, like=start)


def _check_broken_batch(trial: Trial, step: Any, start: PyTree) -> None:
    _, good = step(trial.params, start, jnp.float32(1))
    # after a good batch: a first one would find nothing to spoil
    updates, state = step(trial.params, good, jnp.float32(jnp.nan))
    arrays = map(np.asarray, jax.tree.leaves(updates))
    largest = max(float(np.abs(u).max()) for u in arrays)
    _holds(trial, "a broken batch gives an update of zeros", largest == 0, f"found {largest:.3g}")
    _finite(trial, "state after a broken batch", state, like=start)
    after = step(trial.params, state, jnp.float32(1))
    _finite(trial, "step after a broken one", after, like=start)


def _check_checkpoint(trial: Trial, step: Any, start: PyTree) -> None:
    _, state = step(trial.params, start, jnp.float32(1))
    # as files keep it
    saved = [np.asarray(x) for x in jax.tree.leaves(state)]
    arrays = [jnp.asarray(x) for x in saved]
    restored = jax.tree.unflatten(jax.tree.structure(start), arrays)
    # the same step from both
    expected, got = (step(trial.params, s, jnp.float32(1)) for s in (state, restored))
    for path, x, y in _pairs(got, expected):
        same = np.array_equal(x, y, equal_nan=True)
        law = "a restored state goes on as it was"
        _holds(trial, law, same, f"{path} differs in {np.count_nonzero(x != y)} entries")


def _kinds(tree: PyTree) -> dict[str, tuple]:
    """Shape, dtype and weak type of every leaf, by path."""
    return {
        jax.tree_util.keystr(path): (x.shape, str(x.dtype), jax.typeof(x).weak_type)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def _pairs(got: PyTree, expected: PyTree) -> list[tuple[str, np.ndarray, np.ndarray]]:
    leaves = jax.tree_util.tree_leaves_with_path(got)
    others = jax.tree.leaves(expected)
    return [
        (jax.tree_util.keystr(path), np.asarray(x), np.asarray(y))
        for (path, x), y in zip(leaves, others, strict=True)
    ]


def _finite(trial: Trial, when: str, tree: PyTree, *, like: PyTree) -> None:
    """No NaN anywhere; infinity only in scalars, and only if the transformation starts with it."""
    # clips start with an infinite bound, say
    at_first = map(np.asarray, jax.tree.leaves(like))
    infinite_at_first = any(np.isinf(x).any() for x in at_first)
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        x = np.asarray(x)
        # a matrix has no reason to be infinite
        bad = np.isnan(x) if infinite_at_first and x.ndim == 0 else ~np.isfinite(x)
        name = jax.tree_util.keystr(path)
        _holds(trial, "all is finite", not bad.any(), f"{when}, {name} is {x.ravel()[:3]}")


def _holds(trial: Trial, law: str, true: Any, number: str) -> None:
    if not true:
        raise AssertionError(f"transformation {trial.name!r}: {law}: {number}.")
