"""Memory, traffic and work of a preconditioner on many devices, before anything runs."""

from kfac_optax.planner.bubbles import Filled, bubble_table, fill
from kfac_optax.planner.formulas import Costs, Shape, costs
from kfac_optax.planner.models import MODELS
from kfac_optax.planner.pipeline import Stage, Work, schedule, stage_of

__all__ = [
    "MODELS",
    "Costs",
    "Filled",
    "Shape",
    "Stage",
    "Work",
    "bubble_table",
    "costs",
    "fill",
    "schedule",
    "stage_of",
]
