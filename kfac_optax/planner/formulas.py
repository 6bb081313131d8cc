"""What K-FAC costs on `W` devices, from the shapes of its layers."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import AbstractMesh

from kfac_optax.engine.division import EIGH, Share, divide
from kfac_optax.engine.placement import Placement
from kfac_optax.linalg.lattice import words_for


class Shape(NamedTuple):
    """Layers of equal shape: `copies` matrices `[p, q]`, with the bias row in `p`."""

    copies: int
    p: int
    q: int

    @property
    def factors(self) -> int:
        """Numbers in the factors `A`, `G` of one layer, `p^2 + q^2`."""
        return self.p**2 + self.q**2

    @property
    def packed(self) -> int:
        """Numbers in them without double entries, `(p (p + 1) + q (q + 1)) / 2`."""
        return (self.factors + self.p + self.q) // 2

    @property
    def inverse(self) -> int:
        """Numbers in their eigendecompositions, `p^2 + q^2 + p + q`."""
        return self.factors + self.p + self.q

    @property
    def gradient(self) -> int:
        """Numbers in the gradient of one layer, `p q`."""
        return self.p * self.q

    @property
    def work(self) -> int:
        """What the refresh of one layer is counted as when work is divided, `p^3 + q^3`."""
        return self.p**3 + self.q**3


class Costs(NamedTuple):
    """What one strategy costs. Bytes are those of one device, the busiest.

    Attributes:
      memory: factors and inverses.
      statistics: sent whenever statistics are taken, the sum of all factors over devices.
      refresh: sent in a refresh.
      step: sent in every step, beside the gradient's own sum.
      work: operations of a refresh, `9 (p^3 + q^3)` a layer.
      balance: work of the busiest device over a W-th of all work.
    """

    memory: int
    statistics: float
    refresh: float
    step: float
    work: float
    balance: float

    def per_step(self, curvature_every: int, inverse_every: int) -> float:
        """Bytes sent in a step on average.

        >>> print(Costs(0, 40.0, 100.0, 5.0, 0.0, 1.0).per_step(10, 100))
        10.0
        """
        # a statistic and a refresh are shared out among the steps of their periods
        return self.step + self.statistics / curvature_every + self.refresh / inverse_every


def costs(
    shapes: Sequence[Shape],
    devices: int,
    worker_fraction: float | None = 1.0,
    itemsize: int = 4,
    *,
    packed: bool = False,
    sent_itemsize: int | None = None,
    statistics_bits: int | None = None,
    statistics: str = "averaged",
    flops_per_byte: float = 0.0,
) -> Costs:
    """Memory, traffic and work of `kfac` on one of `W` devices.

    An all-reduce of `n` bytes over `W` devices sends `2 (W - 1) / W n` from each, an all-gather to
    `n` bytes sends `(W - 1) / W n`, as rings do.

    | | every statistic | refresh | every step |
    | --- | --- | --- | --- |
    | replicated | `p^2 + q^2`, summed | - | - |
    | all keep all | the same | `p^2 + q^2 + p + q` of all layers | - |
    | `m` of `W` keep each | the same | the same, of `m / W` of them | `p q` of all layers |

    Scattered statistics are sent half as often, to the device that factorises a layer, local ones
    not at all; then each factor is kept by one device. What is sooner made than sent, by
    `flops_per_byte`, is no part of the refresh's traffic.

    What is rounded up to places of equal number on all devices is counted as it is sent.

    Args:
      shapes: of all layers.
      devices: W.
      worker_fraction: as in `Placement`; `None`: without a placement, every device factorises all.
      itemsize: bytes of a number.
      packed: whether factors are sent without their double entries.
      sent_itemsize: bytes of a number of a statistic that is sent, if not `itemsize`.
      statistics_bits: as in `Placement`; bytes are those where the bits suffice. Where they do not
        the packed factors are sent as well.
      statistics: as in `Placement`.
      flops_per_byte: as in `Placement`.

    Returns:
      Costs of the busiest device.

    Raises:
      ValueError: words that need a placement without one, or that do not go together.

    >>> one = costs([Shape(24, 1024, 1024)], 8, None)
    >>> for fraction in (1.0, 0.5, 0.0):
    ...     many = costs([Shape(24, 1024, 1024)], 8, fraction)
    ...     print(f"{many.memory / one.memory:.2f} {many.work / one.work:.3f} {many.step / 2**20:.0f}")
    1.00 0.125 0
    0.75 0.125 48
    0.56 0.125 84

    Reference: Pauloski, Huang, Huang, Venkataraman, Chard, Foster & Zhang, KAISA: An Adaptive
      Second-Order Optimizer Framework for Deep Neural Networks (2021), for the strategies.
    """
    factors = sum(s.copies * s.factors for s in shapes)
    sent_bytes = _bytes_sent(shapes, packed, sent_itemsize or itemsize, statistics_bits)
    # a sum over a ring sends everything twice: once to add up, once to hand on
    summed = _ring(devices) * 2 * sent_bytes
    total = EIGH * sum(float(s.copies * s.work) for s in shapes)
    inverses = sum(s.copies * s.inverse for s in shapes)
    # every device does all of the work
    if worker_fraction is None:
        _check_without_placement(statistics, flops_per_byte, statistics_bits)
        return Costs((factors + inverses) * itemsize, summed, 0.0, 0.0, total, float(devices))
    # no device is needed to divide work over some
    placement = Placement(
        "device",
        worker_fraction,
        AbstractMesh((devices,), ("device",)),
        statistics=statistics,
        flops_per_byte=flops_per_byte,
        statistics_bits=statistics_bits,
    )
    named = {f"{i}": (s.copies, float(s.work)) for i, s in enumerate(shapes)}
    inverse_bytes = {f"{i}": float(s.inverse * itemsize) for i, s in enumerate(shapes)}
    shares = divide(placement, named, inverse_bytes).shares
    pairs = [(s, shares[f"{i}"]) for i, s in enumerate(shapes)]
    # operations of every device, [W]
    load = sum(share.made.ravel() * EIGH * float(s.work) for s, share in pairs)
    # the fullest device decides on memory
    kept = sum(share.slots * s.inverse for s, share in pairs)
    if statistics != "averaged":
        factors = sum(share.most * s.factors for s, share in pairs)
        summed = 0.0
    if statistics == "scattered":
        # numbers for every device, [W]: all rows are as long as the longest
        rows = sum(share.count.ravel() * (s.packed if packed else s.factors) for s, share in pairs)
        summed = (devices - 1) * float(np.max(rows)) * (sent_itemsize or itemsize)
    refresh = sum(_refreshed(share) * s.inverse for s, share in pairs)
    step = sum(_exchanged(share) * s.gradient for s, share in pairs)
    return Costs(
        memory=(factors + kept) * itemsize,
        statistics=summed,
        refresh=refresh * itemsize,
        step=step * itemsize,
        work=float(np.max(load)),
        # largest over mean: one where all have the same work
        balance=float(np.max(load) / np.mean(load)),
    )


def _bytes_sent(shapes: Sequence[Shape], packed: bool, itemsize: int, bits: int | None) -> int:
    """Of the statistics of all layers, once."""
    if bits is None:
        numbers = sum(s.copies * (s.packed if packed else s.factors) for s in shapes)
        return numbers * itemsize
    numbers = sum(s.copies * s.packed for s in shapes)
    # a checksum, and a count of devices that could not take part
    return 4 * (words_for(numbers, bits) + 2)


def _check_without_placement(
    statistics: str, flops_per_byte: float, statistics_bits: int | None
) -> None:
    if statistics != "averaged" or flops_per_byte or statistics_bits is not None:
        raise ValueError(
            f"costs: got statistics={statistics!r}, flops_per_byte={flops_per_byte!r} and "
            f"statistics_bits={statistics_bits!r} without a placement; expected "
            "worker_fraction= with them, a number."
        )


def _ring(devices: int) -> float:
    """Share of the result that a device sends, or receives, in a ring."""
    return (devices - 1) / devices


def _refreshed(share: Share) -> float:
    """Matrices that a device sends in a refresh."""
    if share.everywhere:
        return 0.0
    groups, workers = share.count.shape
    # one group: the inverses go to everyone
    return _to_all(workers, share.most, share.copies if groups == 1 else share.slots)


def _exchanged(share: Share) -> float:
    """Preconditioned gradients that a device sends in a step."""
    groups = share.count.shape[0]
    # groups hand each other what they have solved for
    return 0.0 if groups == 1 else _to_all(groups, share.slots, share.copies)


def _to_all(devices: int, places: int, copies: int) -> float:
    """Matrices sent so that all devices have all: gathered, or where many places are empty summed."""
    return _ring(devices) * min(devices * places, 2 * copies)
