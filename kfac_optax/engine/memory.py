"""Whether what is kept of every bucket fits into the memory of a device."""

from collections.abc import Mapping, Sequence

from kfac_optax._tree import tree_bytes
from kfac_optax._types import Bucket, PyTree
from kfac_optax.engine.placement import Placement
from kfac_optax.engine.state import OwnFactors, own_values


def check_memory(
    where: str,
    limit: float,
    placement: Placement | None,
    buckets: Sequence[Bucket],
    factors: Mapping[str, PyTree],
    inverses: Mapping[str, PyTree],
) -> None:
    """Checks the factors and inverses that one device keeps, arrays or shapes of them, by bucket.

    Raises:
      ValueError: a bucket needs more than the limit, in bytes, or all of them together do.
    """
    needed = {}
    for bucket in buckets:
        name, statistic = bucket.name, factors[bucket.name]
        kept = _on_device(placement, own_values(statistic), isinstance(statistic, OwnFactors))
        divided = placement is not None and placement.divided
        needed[name] = kept + _on_device(placement, inverses[name], divided)
    total, largest = sum(needed.values()), max(needed.values())
    if total <= limit:
        return
    # the bucket that does not fit alone, or the largest of all that do not together
    named = next(bucket for bucket in buckets if needed[bucket.name] == largest)
    what = f"bucket {named.name} ({named.copies} matrices {named.shape[0]} x {named.shape[1]})"
    size = largest
    if largest <= limit:
        what = f"all {len(buckets)} buckets, {_words(largest)} of them of {what},"
        size = total
    raise ValueError(
        f"{where}: the factors and inverses of {what} take {_words(size)} on every device; "
        f"expected at most memory={limit:g} bytes, {_words(limit)}. Keep each inverse on fewer "
        "devices (worker_fraction=0), factors too (statistics='scattered'), or give wide layers a "
        "block that keeps less, such as low_rank()."
    )


def _on_device(placement: Placement | None, tree: PyTree, divided: bool) -> float:
    """Bytes on one device of what all of them or each has."""
    # inside `shard_map` shapes are those of one device already
    if placement is None or not divided or placement.mapped:
        return tree_bytes(tree)
    return tree_bytes(tree) / placement.devices


def _words(size: float) -> str:
    return f"{size / 2**20:.4g} MiB"
