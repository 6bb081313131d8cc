"""What a preconditioner or a whole optimizer owes its caller."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kfac_optax._types import PyTree
from kfac_optax.testing.factorizations import side_by_side

_ONE = np.float32(1)  # scale of a good batch


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
    start = _start(trial)
    _check_steps(trial, step, start)
    _check_factorizations(trial, step, start)
    _check_zero_batch(trial, step, start)
    _check_broken_batch(trial, step, start)
    _check_checkpoint(trial, step, start)


def check_steps(trial: Trial) -> None:
    """Structure, shapes, dtypes and weak types of the state stay as `init` made them, updates are
    like parameters, all is finite, and nothing compiles twice.
    """
    _check_steps(trial, _Compiled(trial), _start(trial))


def check_factorizations(trial: Trial) -> None:
    """On a CPU, no two LAPACK calls of a step run at the same time: each could wait for the other
    for ever. `jax.lax.optimization_barrier` does not order them, a path of data does.
    """
    _check_factorizations(trial, _Compiled(trial), _start(trial))


def check_zero_batch(trial: Trial) -> None:
    """A batch of zeros leaves state and update finite."""
    _check_zero_batch(trial, _Compiled(trial), _start(trial))


def check_broken_batch(trial: Trial) -> None:
    """A batch of NaN gives an update of zeros, and a state from which good batches go on."""
    _check_broken_batch(trial, _Compiled(trial), _start(trial))


def check_checkpoint(trial: Trial) -> None:
    """A state that went through a list of numpy arrays goes on as the one it was made of."""
    _check_checkpoint(trial, _Compiled(trial), _start(trial))


def _start(trial: Trial) -> PyTree:
    """The state before the first step."""
    init = jax.jit(trial.tx.init)
    return init(trial.params)


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
            # Runs when the step is traced only, since sizes of JAX's caches are no public number: a
            # second trace would mean that something has changed its type.
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

    def program(self, params: PyTree, state: PyTree, scale: jax.Array) -> str:
        """The text of what was compiled for such arguments."""
        return str(self._step.lower(params, state, scale).compile().as_text())


def _check_steps(trial: Trial, step: Any, start: PyTree) -> None:
    # a few steps: a first one may differ from those behind it
    params = trial.params
    state = start
    expected = _kinds(start)
    weak = [path for path, kind in expected.items() if kind.weak]
    _holds(trial, "init makes no weak types", not weak, f"weak: {weak}")
    for number in range(3):
        updates, state = step(params, state, _ONE)
        got = _kinds(state)
        # where another type, shape or structure would be compiled again
        changed = {path: kind for path, kind in got.items() if expected.get(path) != kind}
        same = not changed and got.keys() == expected.keys()
        law = "the state keeps its structure, shapes and dtypes"
        _holds(trial, law, same, f"changed in step {number}: {changed or got.keys()}")
        made = _kinds(updates)
        law = "updates are like parameters"
        _holds(trial, law, made == _kinds(params), f"got {made}")
        _finite(trial, f"step {number}", (updates, state), like=start)
        # small steps, so that the problem stays what it is
        small = jax.tree.map(lambda u: -0.01 * u, updates)
        params = optax.apply_updates(params, small)
    law = "one trace serves all steps"
    _holds(trial, law, step.traces == 1, f"{step.traces} traces")


def _check_factorizations(trial: Trial, step: Any, start: PyTree) -> None:
    pairs, calls = side_by_side(step.program(trial.params, start, _ONE))
    law = "factorisations follow one another"
    _holds(trial, law, not pairs, f"{len(pairs)} pairs of {calls} calls may wait for each other")


def _check_zero_batch(trial: Trial, step: Any, start: PyTree) -> None:
    result = step(trial.params, start, jnp.float32(0))
    _finite(trial, "after a batch of zeros", result, like=start)


def _check_broken_batch(trial: Trial, step: Any, start: PyTree) -> None:
    _, good = step(trial.params, start, _ONE)
    # after a good batch: a first one would find nothing to spoil
    updates, state = step(trial.params, good, jnp.float32(jnp.nan))
    arrays = map(np.asarray, jax.tree.leaves(updates))
    largest = max(float(np.abs(u).max()) for u in arrays)
    law = "a broken batch gives an update of zeros"
    _holds(trial, law, largest == 0, f"found {largest:.3g}")
    _finite(trial, "state after a broken batch", state, like=start)
    after = step(trial.params, state, _ONE)
    _finite(trial, "step after a broken one", after, like=start)


def _check_checkpoint(trial: Trial, step: Any, start: PyTree) -> None:
    _, state = step(trial.params, start, _ONE)
    # as files keep it
    saved = [np.asarray(x) for x in jax.tree.leaves(state)]
    arrays = [jnp.asarray(x) for x in saved]
    structure = jax.tree.structure(start)
    restored = jax.tree.unflatten(structure, arrays)
    # the same step from both
    expected = _by_path(step(trial.params, state, _ONE))
    got = _by_path(step(trial.params, restored, _ONE))
    law = "a restored state goes on as it was"
    for path, x in got.items():
        y = expected[path]
        same = np.array_equal(x, y, equal_nan=True)
        differing = np.count_nonzero(np.asarray(x) != np.asarray(y))
        _holds(trial, law, same, f"{path} differs in {differing} entries")


class _Kind(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    weak: bool


def _kinds(tree: PyTree) -> dict[str, _Kind]:
    """Shape, dtype and weak type of every leaf, by path."""
    kinds = {}
    for path, x in _by_path(tree).items():
        weak = jax.typeof(x).weak_type
        kinds[path] = _Kind(x.shape, str(x.dtype), weak)
    return kinds


def _by_path(tree: PyTree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): x for path, x in leaves}


def _finite(trial: Trial, when: str, tree: PyTree, *, like: PyTree) -> None:
    """No NaN anywhere; infinity only in scalars, and only if the transformation starts with it."""
    # clips start with an infinite bound, say
    at_first = map(np.asarray, jax.tree.leaves(like))
    infinite_at_first = any(np.isinf(x).any() for x in at_first)
    for path, x in _by_path(tree).items():
        x = np.asarray(x)
        # a matrix has no reason to be infinite
        may_be_infinite = infinite_at_first and x.ndim == 0
        bad = np.isnan(x) if may_be_infinite else ~np.isfinite(x)
        some = x.ravel()[:3]
        _holds(trial, "all is finite", not bad.any(), f"{when}, {path} is {some}")


def _holds(trial: Trial, law: str, true: Any, number: str) -> None:
    if not true:
        raise AssertionError(f"transformation {trial.name!r}: {law}: {number}.")
