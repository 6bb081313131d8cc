"""Data passed between the parts of the package; no logic.

Words: a *site* is one tapped call seen by tracing, a *layer* the parameters that one curvature
block owns (kernel and bias), a *bucket* the layers of equal shape that one batched call serves.
"""

from collections.abc import Callable
from typing import Any

import jax

from kfac_optax._block_types import Average, Block, Bucket, Near, Travel
from kfac_optax._coupling_types import Coupling, Directions, Fine, Sloped, System, Vector
from kfac_optax._layer_types import Layer, Layers, Layout, Part, PyTree, Staircase, Uncovered, Use

__all__ = [
    "Average",
    "Block",
    "Bucket",
    "Coupling",
    "Directions",
    "Fine",
    "Layer",
    "Layers",
    "Layout",
    "Near",
    "Numeric",
    "Part",
    "PyTree",
    "ScalarOrSchedule",
    "Sloped",
    "Staircase",
    "System",
    "Travel",
    "Uncovered",
    "Use",
    "Vector",
]

Numeric = float | int | jax.Array
ScalarOrSchedule = Numeric | Callable[[Any], Numeric]
