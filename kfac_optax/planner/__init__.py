"""Memory, traffic and work of a preconditioner on many devices, before anything runs."""

from kfac_optax.planner.formulas import Costs, Shape, costs
from kfac_optax.planner.models import MODELS

__all__ = ["MODELS", "Costs", "Shape", "costs"]
