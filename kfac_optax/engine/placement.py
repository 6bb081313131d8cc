"""Where the work on layers is done: a record of the choice."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._types import Travel
from kfac_optax._validate import check_choice, check_number
from kfac_optax.estimators.reductions import names_of
from kfac_optax.linalg.lattice import BITS

STATISTICS = ("averaged", "scattered", "local")


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

    With `statistics="scattered"` the sum of a layer's statistics arrives at the device that
    factorises it, which alone keeps its factors: half the traffic, and the memory for factors
    divided. Numbers are the same.

    With `statistics="local"` no factor travels: the device that factorises a layer measures it on
    its own part of the batch and alone keeps its factors, also divided over the axis. So they are
    means over `N / W` of `N` examples, noisier by as much, and numbers do depend on the division:
    of the layers, not on `worker_fraction`.

    Attributes:
      axis: name of the mesh axis, or several whose devices are counted together.
      worker_fraction: share of the devices that keep each inverse, in [0, 1]; 0 stands for one
        device.
      mesh: the mesh that has the axis. May be left out inside `shard_map` and `pmap` with
        `worker_fraction=1`.
      packed: send Kronecker factors without their double entries, half the bytes of a statistic.
        With `axis_name=`, as are the next two: under `jit` XLA decides what it sends.
      statistics_dtype: in which statistics are sent and summed, `jnp.bfloat16` say; averages are
        kept as ever. `None`: their own.
      statistics_bits: in how many bits the numbers of Kronecker factors are sent, 2 to 16, without
        double entries: as differences from the averages that all devices have, rounded so that
        eigenvalues of `A (x) G + damping I` are off by less than a quarter of the damping. Statistics
        too far from the averages for that many bits, or so large that averages might grow by more
        than two fifths, the first ones always, are sent as they are, after the attempt. `None`: all bits.
      statistics: `"averaged"` over the devices, `"scattered"` or `"local"`; the latter two inside
        `shard_map` and `pmap` with `axis_name=`, without a coupling. Blocks that take every
        statistic into their inverse (`ekfac`, those followed online) want `worker_fraction=0` with
        them.
      flops_per_byte: operations that a device does in the time it takes to send a byte. A layer
        whose inverse is sooner made, by `9 (p^3 + q^3)` operations, than sent is made by every
        device that keeps it. 0: all are sent.
      memory: bytes that factors and inverses may take on a device. Where they need more, `init` says
        so before it makes any, and which layers they belong to. `None`: not checked.

    Raises:
      ValueError: the mesh has no such axis, or the fraction does not divide its devices; words that
        do not go together.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> print(Placement("data", 0.0, mesh).workers)
    1
    >>> Placement("model", mesh=mesh)
    Traceback (most recent call last):
    ValueError: Placement: axis 'model' is not on the mesh, which has data; expected one of these.

    Reference: Pauloski, Huang, Huang, Venkataraman, Chard, Foster & Zhang, KAISA: An Adaptive
      Second-Order Optimizer Framework for Deep Neural Networks (2021). Local statistics: Zhang,
      Shi, Wang & Li, Scalable K-FAC Training for Deep Neural Networks with Distributed
      Preconditioning (2022). What is made everywhere: Shi, Zhang & Li, Accelerating Distributed
      K-FAC with Smart Parallelism of Computing and Communication Tasks (2021). Statistics in a few
      bits: Alimisis, Davies & Alistarh, Communication-Efficient Distributed Optimization with
      Quantized Preconditioners (2021).
    """

    axis: str | tuple[str, ...]
    worker_fraction: float = 1.0
    mesh: Any = None
    packed: bool = False
    statistics_dtype: Any = None
    statistics: str = "averaged"
    flops_per_byte: float = 0.0
    statistics_bits: int | None = None
    memory: float | None = None

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
        self._check_bits()
        check_number("Placement", "worker_fraction", self.worker_fraction, at_least=0, at_most=1)
        check_number("Placement", "flops_per_byte", self.flops_per_byte, at_least=0)
        if self.memory is not None:
            check_number("Placement", "memory", self.memory, above=0)
        check_choice("Placement", "statistics", self.statistics, STATISTICS)
        if self.statistics != "averaged":
            self._check_owned()
        if self.mesh is not None:
            self._check_mesh()
        elif self.worker_fraction < 1:
            raise ValueError(
                f"Placement: worker_fraction={self.worker_fraction!r} divides the state, whose "
                "shape depends on the number of devices; got mesh=None. Pass mesh=, the mesh that "
                "has the axis, also inside shard_map and pmap."
            )

    def _check_bits(self) -> None:
        bits = self.statistics_bits
        if bits is None:
            return
        fewest, most = BITS
        if not isinstance(bits, int) or isinstance(bits, bool) or not fewest <= bits <= most:
            raise ValueError(
                f"Placement: statistics_bits={bits!r}; expected a whole number from {fewest} to "
                f"{most}, or None."
            )
        if self.statistics_dtype is not None:
            raise ValueError(
                f"Placement: got statistics_bits={bits} with statistics_dtype="
                f"{self.statistics_dtype!r}; expected one of them: both say how many bits a number "
                "has. Leave statistics_dtype out, or statistics_bits."
            )

    def _check_owned(self) -> None:
        """Raises where a word has no meaning for statistics that one device has."""
        got = f"Placement: got statistics={self.statistics!r}"
        if self.mesh is None:
            raise ValueError(
                f"{got}, which divides the factors, whose shape depends on the number of devices; "
                "and mesh=None. Pass mesh=, the mesh that has the axis."
            )
        if self.flops_per_byte:
            raise ValueError(
                f"{got} with flops_per_byte={self.flops_per_byte!r}; expected it left out: no other "
                "device can factorise what one device has."
            )
        if self.statistics_bits is not None:
            raise ValueError(
                f"{got} with statistics_bits={self.statistics_bits!r}; expected it left out: others "
                "have no averages to send differences from. Use statistics='averaged'."
            )
        if self.statistics == "local" and self.travel != Travel():
            raise ValueError(
                f"{got} with packed={self.packed!r} and statistics_dtype={self.statistics_dtype!r}; "
                "expected neither: no factor is sent."
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
        return Travel(self.packed, self.statistics_dtype, self.statistics_bits)

    @property
    def divided(self) -> bool:
        """Whether the state is divided: some devices do not keep some inverses."""
        return self.mesh is not None and self.workers < self.devices

    @property
    def local(self) -> bool:
        """Whether every device measures its own layers on its own part of the batch, and there are
        several.
        """
        return self.statistics == "local" and self.devices > 1

    @property
    def owned(self) -> bool:
        """Whether every device keeps the factors of its own layers alone, and there are several."""
        return self.statistics != "averaged" and self.devices > 1

    def averaged_over(self, axis_name: Any) -> Any:
        """Of the axes that share a batch those whose devices all measure the same layers; `None`
        where there are none.
        """
        if not self.local:
            return axis_name
        return tuple(name for name in names_of(axis_name) if name not in self.names) or None

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
          ValueError: neither a mesh is known nor is the axis mapped, or both differ; every device
            is to keep factors of its own and the axis is not mapped.
        """
        if not self.mapped:
            if self.owned:
                raise ValueError(
                    f"Placement: axis {self.axis!r} is not mapped here, and statistics="
                    f"{self.statistics!r}; expected to run inside shard_map or pmap over the axis. "
                    "Under jit a batch is measured as a whole: use statistics='averaged'."
                )
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
