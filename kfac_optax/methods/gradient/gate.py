"""What goes in and out of an update: bad gradients are left out and counted, dtypes are kept."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kfac_optax._layout import varying_as
from kfac_optax._tree import all_finite, named_leaves, replace_leaves, select
from kfac_optax._types import PyTree, ScalarOrSchedule
from kfac_optax._validate import Checked, checked
from kfac_optax.engine.state import GradientCounts
from kfac_optax.linalg.division import positive_or_one
from kfac_optax.methods.gradient.axes import Group, gather, scatter
from kfac_optax.step_rules._per_layer import within

Held = dict[str, dict[str, Any]]  # by group, then by axis


def no_counts() -> GradientCounts:
    """All zero; a new array each, as a buffer that occurs twice cannot be donated."""
    return GradientCounts(_zero(), _zero(), _zero(), _zero(), _zero())


def placeholders() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """In place of the four trees of a state where there is no parameter."""
    return (_zero(), _zero(), _zero(), _zero())


def _zero() -> jax.Array:
    return jnp.zeros((), jnp.int32)


def replace_all(tree: PyTree, leaves: dict[str, jax.Array]) -> PyTree:
    """A tree of the same structure with other leaves, in tree order, whatever their dtypes."""
    return jax.tree.unflatten(jax.tree.structure(tree), list(leaves.values()))


def state_dtype(leaves: Mapping[str, Any]) -> Any:
    """The widest of float32 and the dtypes of the leaves."""
    dtypes = [x.dtype for x in leaves.values()]
    return jnp.result_type(jnp.float32, *dtypes)


def dtype_of(held: PyTree) -> Any:
    """The dtype in which a state is kept."""
    leaves = jax.tree.leaves(held)
    return leaves[0].dtype if leaves else jnp.dtype(jnp.float32)


def check_groups(
    where: str,
    groups: tuple[Group, ...],
    held: Mapping[str, Any],
) -> None:
    """Raises where a state belongs to other leaves.

    Raises:
      ValueError: names what was found and expected.
    """
    # tensors of every group, now and at the start
    got = {group.name: group.copies for group in groups}
    expected = {name: _copies(axes) for name, axes in held.items()}
    same = got.keys() == expected.keys()
    # of no array nothing is known
    known = {name: n for name, n in expected.items() if n is not None}
    if not same or any(got[name] != n for name, n in known.items()):
        raise ValueError(
            f"{where}.update: the gradients make the groups {got}, but the state has {expected}. "
            "Pass a gradient of the parameters that `init` got."
        )


def _copies(axes: Any) -> int | None:
    leaves = jax.tree.leaves(axes)
    return leaves[0].shape[0] if leaves else None


def cleaned_tensors(
    groups: tuple[Group, ...],
    leaves: Mapping[str, jax.Array],
    dtype: Any,
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Tensors by group in the dtype of the state, zero where not all are finite; whether they are.

    Asked of stacked tensors: a number that depends on all leaves of a deep net and changes each
    takes long to compile.
    """
    # float32 at least, before products are formed
    wide = {n: x.astype(dtype) for n, x in leaves.items()}
    tensors = {group.name: gather(group, wide) for group in groups}
    finite = all_finite(tensors)
    cleaned = {n: jnp.where(finite, x, 0) for n, x in tensors.items()}
    return cleaned, finite


def passed_on(
    updates: PyTree,
    groups: tuple[Group, ...],
    new: Mapping[str, jax.Array],
    finite: jax.Array,
) -> tuple[PyTree, jax.Array]:
    """The update in the dtypes of the gradient, zero as a whole unless all of it is finite; whether
    it is. Leaves without entries stay as they are.
    """
    leaves = named_leaves(updates)
    # all or nothing: a step in a part of the leaves would be another direction
    good = finite & all_finite(new)
    cast: dict[str, jax.Array] = {}
    for group in groups:
        # [copies, *block], still of the width of the state
        whole = jnp.where(good, new[group.name], 0)
        dtypes = {leaves[view.name].dtype for view in group.views}
        if len(dtypes) == 1:  # stacked: every operation on a leaf of its own has to be compiled
            (dtype,) = dtypes
            cast |= scatter(group, within(whole, dtype), good)
            continue
        for name, x in scatter(group, whole, good).items():
            cast[name] = within(x, leaves[name].dtype)
    return replace_leaves(updates, cast), good


def scattered(
    groups: tuple[Group, ...],
    tensors: Mapping[str, jax.Array],
    some: jax.Array,
) -> dict[str, jax.Array]:
    """Leaves of all groups by name, see `scatter`."""
    out: dict[str, jax.Array] = {}
    for group in groups:
        out |= scatter(group, tensors[group.name], some)
    return out


def checked_all(
    memory: dict[str, Checked],
    count: jax.Array,
    **given: ScalarOrSchedule,
) -> tuple[dict[str, Any], dict[str, Checked]]:
    """Values of the hyperparameters at a step, by name, and what is remembered of them."""
    values = {}
    for name, value in given.items():
        values[name], memory = checked(memory, name, value, count)
    return values, memory


def averaged(
    decay: Any,
    count: jax.Array,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """Weights of what is held and of what is new, as number `count` of those accepted.

    `min(1 - 1/count, decay)` and one minus that; with `decay` 1 both are one: a sum.

    >>> print(*averaged(0.9, jnp.int32(4), jnp.float32), *averaged(1.0, jnp.int32(4), jnp.float32))
    0.75 0.25 1.0 1.0
    """
    # number k enters with weight 1/k while that is more than 1 - decay
    k = jnp.maximum(count, 1).astype(dtype)
    decay = jnp.asarray(decay, dtype)
    weight = jnp.minimum(1 - 1 / k, decay)
    # a decay of one sums, as Shampoo and AdaGrad do
    sums = decay >= 1
    held = jnp.where(sums, 1, weight)
    new = jnp.where(sums, 1, 1 - weight)
    return held, new


def unbiased(moment: jax.Array, b: jax.Array, t: jax.Array) -> jax.Array:
    """The mean of an average that started at zero `t` steps ago, `moment / (1 - b^t)`.

    >>> print(unbiased(jnp.float32(0.75), jnp.float32(0.5), jnp.int32(2)))
    1.0
    """
    power = b ** t.astype(b.dtype)
    return moment / positive_or_one(1 - power)


def accepted(
    new: Held,
    old: Held,
    finite: jax.Array,
) -> tuple[Held, jax.Array]:
    """What is new where it is finite, copy by copy, and how many of finite gradients were not."""
    kept: Held = {}
    bad = _zero()
    for name, axes in new.items():
        kept[name] = {}
        for axis, value in axes.items():
            # a copy may fail by itself
            good = jax.vmap(all_finite)(value)
            kept[name][axis] = select(good & finite, value, old[name][axis])
            bad = bad + jnp.sum(~good & finite, dtype=jnp.int32)
    return kept, bad


def as_finite(new: PyTree, old: PyTree) -> jax.Array:
    """Whether every leaf that was finite is so still; some hold an infinity from the start.

    >>> print(as_finite({"mean": jnp.inf}, {"mean": 0.0}), as_finite({"least": 1.0}, {"least": jnp.inf}))
    False True
    """
    kept = jnp.bool_(True)
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    for x, before in pairs:
        # counts are finite anyway
        if jnp.issubdtype(jnp.result_type(x), jnp.inexact):
            kept = kept & (all_finite(x) | ~all_finite(before))
    return kept


def when_due(due: Any, change: Callable[[Any], Any], held: Any) -> Any:
    """`change(held)` where due, in a branch of its own unless that is known."""
    if isinstance(due, bool):
        return change(held) if due else held
    # both branches differ between devices where one of them does
    held = varying_as(held, (due, held))

    def changed(held: Any) -> Any:
        return varying_as(change(held), (due, held))

    return jax.lax.cond(due, changed, lambda held: held, held)


def counted(
    counts: GradientCounts,
    finite: jax.Array,
    good: jax.Array,
    statistics: Any,
    inverses: Any,
) -> GradientCounts:
    """The counts after a step."""
    # schedules and periods do not move in steps that are left out
    one_more = optax.safe_increment(counts.gradient_count)
    skipped = (~finite).astype(jnp.int32)
    overflown = (finite & ~good).astype(jnp.int32)
    return GradientCounts(
        gradient_count=jnp.where(good, one_more, counts.gradient_count),
        skipped_gradients=counts.skipped_gradients + skipped,
        skipped_statistics=counts.skipped_statistics + statistics,
        failed_inverses=counts.failed_inverses + inverses,
        non_finite_updates=counts.non_finite_updates + overflown,
    )
