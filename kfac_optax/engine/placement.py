"""Where the work on layers is done: a record of the choice, and what runs on which devices."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kfac_optax._layout import varying_axes
from kfac_optax._types import PyTree, Travel
from kfac_optax._validate import check_number

# what runs on one device: `(held, *whole) -> (held, whole)`
OnDevice = Callable[..., tuple[PyTree, PyTree]]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Divides the work on layers over the devices of a mesh axis.

    Every device has all factors. A refresh is divided into parts of about equal cost, one for each
    of the `W` devices, and what a part gives is sent to those that need it. How many they are is
    `worker_fraction`: each inverse is kept by `m = W * worker_fraction` devices, which precondition
    with it.

    | `worker_fraction` | inverses kept by | sent in a refresh | sent in every step |
    | --- | --- | --- | --- |
    | 1 | all devices | inverses, to all | nothing |
    | m / W | m devices | inverses, to m | preconditioned gradients |
    | 0 or 1 / W | one device | nothing | preconditioned gradients |

    Numbers do not depend on it. With less than all, `inverses` in the state are divided over the
    axis (`state_shardings` says how), in places of equal number on all devices: `ceil(n / groups)`
    of every bucket of `n` matrices, so memory is saved where layers of equal shape repeat.

    Inside `shard_map` or `pmap` over the axis the devices work together directly; elsewhere, under
    `jit`, `mesh` says which they are.

    Attributes:
      axis: name of the mesh axis, or several whose devices are counted together.
      worker_fraction: share of the devices that keep each inverse, in [0, 1]; 0 stands for one
        device.
      mesh: the mesh that has the axis. May be left out inside `shard_map` and `pmap` with
        `worker_fraction=1`.
      packed: send Kronecker factors without their double entries, half the bytes of a statistic.
        With `axis_name=`, as is the next: under `jit` XLA decides what it sends.
      statistics_dtype: in which statistics are sent and summed, `jnp.bfloat16` say; averages are
        kept as ever. `None`: their own.

    Raises:
      ValueError: the mesh has no such axis, or the fraction does not divide its devices.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> print(Placement("data", 0.0, mesh).workers)
    1
    >>> Placement("model", mesh=mesh)
    Traceback (most recent call last):
    ValueError: Placement: axis 'model' is not on the mesh, which has data; expected one of these.

    Reference: Pauloski, Huang, Huang, Venkataraman, Chard, Foster & Zhang, KAISA: An Adaptive
      Second-Order Optimizer Framework for Deep Neural Networks (2021).
    """

    axis: str | tuple[str, ...]
    worker_fraction: float = 1.0
    mesh: Any = None
    packed: bool = False
    statistics_dtype: Any = None

    def __post_init__(self) -> None:
        names = self.names
        if not names or not all(isinstance(name, str) for name in names):
            raise TypeError(
                f"Placement: axis is {self.axis!r}; expected the name of a mesh axis, or a tuple "
                "of names."
            )
        dtype = self.statistics_dtype
        if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"Placement: statistics_dtype is {dtype!r}; expected a floating dtype, such as "
                "jnp.bfloat16, or None."
            )
        check_number("Placement", "worker_fraction", self.worker_fraction, at_least=0, at_most=1)
        if self.mesh is not None:
            self._check_mesh()
        elif self.worker_fraction < 1:
            raise ValueError(
                f"Placement: worker_fraction={self.worker_fraction!r} divides the state, whose "
                "shape depends on the number of devices; got mesh=None. Pass mesh=, the mesh that "
                "has the axis, also inside shard_map and pmap."
            )

    def _check_mesh(self) -> None:
        missing = [name for name in self.names if name not in self.mesh.shape]
        if missing:
            raise ValueError(
                f"Placement: axis {missing[0]!r} is not on the mesh, which has "
                f"{', '.join(map(str, self.mesh.shape))}; expected one of these."
            )
        _workers(self.worker_fraction, self.devices)

    # several axes count as one
    @property
    def names(self) -> tuple[str, ...]:
        """The axes, as a tuple."""
        return self.axis if isinstance(self.axis, tuple) else (self.axis,)

    @property
    def devices(self) -> int:
        """W, of the mesh or, without one, of the axis that is mapped here."""
        if self.mesh is None:
            self.check_mapped()
            return jax.lax.axis_size(self.axis)
        # W
        count = 1
        for name in self.names:
            count *= self.mesh.shape[name]
        return count

    @property
    def workers(self) -> int:
        """Number `m` of devices that keep each inverse."""
        return _workers(self.worker_fraction, self.devices)

    @property
    def travel(self) -> Travel:
        """In which form statistics are sent."""
        return Travel(self.packed, self.statistics_dtype)

    @property
    def divided(self) -> bool:
        """Whether the state is divided: some devices do not keep some inverses."""
        return self.mesh is not None and self.workers < self.devices

    @property
    def mapped(self) -> bool:
        """Whether this is traced inside `shard_map` or `pmap` over the axis."""
        try:
            jax.lax.axis_index(self.axis)
        except NameError:
            return False
        return True

    def check_mapped(self) -> None:
        """Checks that devices can work together here.

        Raises:
          ValueError: neither a mesh is known nor is the axis mapped, or both differ.
        """
        if not self.mapped:
            if self.mesh is None:
                raise ValueError(
                    f"Placement: axis {self.axis!r} is not mapped here, and mesh=None; expected to "
                    "run inside shard_map or pmap over the axis. Under jit pass mesh=."
                )
            return
        size = jax.lax.axis_size(self.axis)
        if self.mesh is not None and size != self.devices:
            raise ValueError(
                f"Placement: axis {self.axis!r} has {size} devices here, and {self.devices} on the "
                "mesh; expected the same. Pass the mesh that the step runs on."
            )


def _workers(fraction: float, devices: int) -> int:
    """`max(1, W * fraction)`.

    Raises:
      ValueError: that is no whole number, or does not divide the devices into groups.
    """
    # m = W fraction, up to rounding, has to divide W
    workers = max(1.0, devices * float(fraction))
    if abs(workers - round(workers)) > 1e-6 * devices or devices % round(workers):
        possible = ", ".join(f"{m}/{devices}" for m in range(1, devices + 1) if devices % m == 0)
        raise ValueError(
            f"Placement: worker_fraction={fraction!r} of {devices} devices is {workers:g}; expected "
            f"a number that divides them: one of {possible}."
        )
    return round(workers)


def checked_placement(
    where: str, placement: Placement | None, parts: int, factored_gradient: bool, axis_name: Any
) -> Placement | None:
    """The placement of a transformation, or `None` where it has nothing to say: on one device.

    Raises:
      ValueError: it divides the state, and something needs all of it.
      TypeError: it is something else.
    """
    if placement is None:
        return None
    if not isinstance(placement, Placement):
        raise TypeError(
            f"{where}: placement is a {type(placement).__name__}; expected a Placement, such as "
            'Placement("data", mesh=mesh), or None.'
        )
    if placement.divided and (parts > 1 or factored_gradient):
        word = "stagger" if parts > 1 else "factored_gradient"
        raise ValueError(
            f"{where}: got {word}= with worker_fraction={placement.worker_fraction!r}, which "
            "divides the inverses over devices; expected all devices to keep all of them. Pass "
            f"worker_fraction=1, or leave {word}= out."
        )
    if placement.travel != Travel() and axis_name is None:
        raise ValueError(
            f"{where}: got a placement with packed={placement.packed!r} and statistics_dtype="
            f"{placement.statistics_dtype!r}, and axis_name=None; expected axis_name=, the axis of "
            "shard_map or pmap over which statistics are summed. Under jit XLA decides what it "
            "sends: leave both out."
        )
    return None if placement.mesh is not None and placement.devices == 1 else placement


def on_devices(placement: Placement, function: OnDevice, held: PyTree, *whole: PyTree) -> Any:
    """Runs `function(held, *whole) -> (held, whole)` on every device of a placement.

    Args:
      placement: says where.
      function: sees what a device holds, and what all devices have; what it returns as whole has to
        be the same on all of them.
      held: arrays divided over the axis.
      *whole: arrays that all devices have.

    Returns:
      Both results, the first divided as `held` is.
    """
    if placement.mapped:
        return function(held, *whole)
    # what is divided has devices on axis 0, the rest is the same everywhere
    divided, same = P(placement.axis), P()
    mapped = jax.shard_map(
        function,
        mesh=placement.mesh,
        in_specs=(divided, *[same] * len(whole)),
        out_specs=(divided, same),
        axis_names=set(placement.names),
        # what blocks compute is not always written for it
        check_vma=False,
    )
    return mapped(held, *whole)


def tracked(placement: Placement) -> bool:
    """Whether `shard_map` keeps track of what differs between devices."""
    # the index of a device is what differs first
    return bool(varying_axes(jax.typeof(jax.lax.axis_index(placement.axis))))


def as_varying(placement: Placement, tree: PyTree) -> PyTree:
    """A tree typed as different on every device, where that is tracked."""
    if not tracked(placement):
        return tree

    def cast(x: jax.Array) -> jax.Array:
        known = varying_axes(jax.typeof(x))
        # pcast takes axes over which a value does not vary yet
        missing = tuple(name for name in placement.names if name not in known)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def check_same(placement: Placement, tree: PyTree) -> None:
    """Checks that statistics are those of all devices, as far as it is tracked.

    Raises:
      ValueError: they differ between the devices that are to share the work on them.
    """
    for x in jax.tree.leaves(tree):
        differs = [name for name in varying_axes(jax.typeof(x)) if name in placement.names]
        if differs:
            raise ValueError(
                f"Placement: the statistics differ between the devices of axis {differs[0]!r}; "
                "expected the same on all of them. Pass axis_name=, the axis over which the batch "
                "is split."
            )
