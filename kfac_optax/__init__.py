"""Natural-gradient preconditioners for JAX as pure Optax transformations."""

from kfac_optax import testing
from kfac_optax._types import Block, Coupling, Directions, Layer, Layers, Sloped, Use
from kfac_optax.bayes.diagonal import sample_diagonal
from kfac_optax.bayes.draw import sample_params
from kfac_optax.bayes.laplace import laplace
from kfac_optax.bayes.posterior import Posterior
from kfac_optax.blocks.diagonal.diagonal import diagonal
from kfac_optax.blocks.diagonal.per_unit import quasi_diagonal_block, unit_block
from kfac_optax.blocks.diagonal.unitwise import unitwise
from kfac_optax.blocks.embedding.embedding import embedding
from kfac_optax.blocks.embedding.tied_embedding import tied_embedding
from kfac_optax.blocks.kronecker.ekfac import ekfac_block
from kfac_optax.blocks.kronecker.foof import foof_block
from kfac_optax.blocks.kronecker.inverse_free import inverse_free
from kfac_optax.blocks.kronecker.kpsvd import kpsvd_block
from kfac_optax.blocks.kronecker.kpsvd_two import kpsvd_two_block
from kfac_optax.blocks.kronecker.kronecker import kronecker
from kfac_optax.blocks.kronecker.masked import masked
from kfac_optax.blocks.kronecker.per_equation import per_equation
from kfac_optax.blocks.kronecker.recurrent import recurrent
from kfac_optax.blocks.kronecker.split_kronecker import split_kronecker
from kfac_optax.blocks.kronecker.sua import sua
from kfac_optax.blocks.kronecker.tekfac import tekfac_block
from kfac_optax.blocks.kronecker.tkfac import tkfac_block
from kfac_optax.blocks.low_rank.low_rank import low_rank
from kfac_optax.blocks.rank_one.mkor import mkor_block
from kfac_optax.blocks.rank_one.rank_one import rank_one
from kfac_optax.blocks.refresh_rules.delayed import delayed
from kfac_optax.blocks.refresh_rules.similarity_gate import similarity_gate
from kfac_optax.blocks.refresh_rules.trace_gate import trace_gate
from kfac_optax.blocks.sample_space.hylo import hylo_block
from kfac_optax.blocks.sample_space.skfac import skfac_block
from kfac_optax.capture.front_ends.manual import tap_conv, tap_dense, tap_embedding, tap_scale_shift
from kfac_optax.couplings.coarse import coarse_correction
from kfac_optax.couplings.deflated import deflated
from kfac_optax.couplings.tridiagonal import tridiagonal
from kfac_optax.engine.choice import blocks_of
from kfac_optax.engine.compiled import compile_step
from kfac_optax.engine.core import scale_by_curvature
from kfac_optax.engine.factor_metric import factor_metric
from kfac_optax.engine.placement import Placement
from kfac_optax.engine.schedule import HostSchedule, refresh_period
from kfac_optax.engine.shardings import state_shardings
from kfac_optax.engine.whole_state import divided_state, whole_state
from kfac_optax.estimators.fisher import Estimator, empirical_fisher, fisher, forward_only, ggn
from kfac_optax.estimators.layer_rows import LayerRows
from kfac_optax.estimators.protocol import Curvature
from kfac_optax.estimators.recursive import backpropagated_metric, recursive_ggn
from kfac_optax.estimators.sample_jacobian import SampleJacobian
from kfac_optax.inspection.coverage import coverage
from kfac_optax.inspection.diagnostics import coarse_fisher, diagnostics
from kfac_optax.inspection.influence import influence, lissa, self_influence
from kfac_optax.inspection.problems import problems
from kfac_optax.inspection.products import (
    factors,
    inverse_product,
    log_determinant,
    square_root_product,
)
from kfac_optax.inspection.pruning import prune, pruning_scores
from kfac_optax.inspection.state_format import check_state, describe_state
from kfac_optax.likelihoods import (
    Bernoulli,
    Categorical,
    Likelihood,
    LogAmplitude,
    Normal,
    from_log_density,
)
from kfac_optax.linalg.row_inverse import inverse_of_rows
from kfac_optax.methods.catalogue import CATALOGUE
from kfac_optax.methods.gradient.adahessian import adahessian
from kfac_optax.methods.gradient.distributed import (
    distributed_shampoo,
    scale_by_distributed_shampoo,
)
from kfac_optax.methods.gradient.esgd import esgd
from kfac_optax.methods.gradient.eva_s import scale_by_eva_s
from kfac_optax.methods.gradient.ggt import ggt
from kfac_optax.methods.gradient.gnb import gnb_estimator
from kfac_optax.methods.gradient.jorge import scale_by_jorge
from kfac_optax.methods.gradient.jorge_preset import jorge
from kfac_optax.methods.gradient.labels import axes_table, matrix_labels
from kfac_optax.methods.gradient.mfac import mfac
from kfac_optax.methods.gradient.presets import eva_s, shampoo, soap
from kfac_optax.methods.gradient.psgd_kron import psgd_kron
from kfac_optax.methods.gradient.psgd_lra import psgd_lra
from kfac_optax.methods.gradient.shampoo import scale_by_shampoo
from kfac_optax.methods.gradient.sketchy import scale_by_sketchy
from kfac_optax.methods.gradient.sketchy_preset import sketchy
from kfac_optax.methods.gradient.soap import scale_by_soap
from kfac_optax.methods.gradient.tnt_preset import scale_by_tnt, tnt
from kfac_optax.methods.gradient.tonga import tonga
from kfac_optax.methods.gradient.vadam import vadam
from kfac_optax.methods.gradient.vogn import vogn
from kfac_optax.methods.kfac.adaptive import kfac_adaptive
from kfac_optax.methods.kfac.ekfac import ekfac
from kfac_optax.methods.kfac.eva import eva, eva_f
from kfac_optax.methods.kfac.fixed import kfac
from kfac_optax.methods.kfac.foof import foof
from kfac_optax.methods.kfac.hylo import hylo
from kfac_optax.methods.kfac.ingd import ingd
from kfac_optax.methods.kfac.k_bfgs_presets import k_bfgs, k_bfgs_l
from kfac_optax.methods.kfac.kflr import kflr
from kfac_optax.methods.kfac.kpsvd import kpsvd
from kfac_optax.methods.kfac.linear_natural import linear_natural
from kfac_optax.methods.kfac.low_rank_blocks import low_rank_blocks
from kfac_optax.methods.kfac.low_rank_corrected import b_kfac_c, b_r_c, b_r_kfac
from kfac_optax.methods.kfac.low_rank_presets import b_kfac, rs_kfac
from kfac_optax.methods.kfac.mkor import mkor
from kfac_optax.methods.kfac.mkor_hybrid import mkor_h
from kfac_optax.methods.kfac.noisy import noisy_kfac
from kfac_optax.methods.kfac.singd import singd
from kfac_optax.methods.kfac.skfac import skfac
from kfac_optax.methods.kfac.tekfac import tekfac
from kfac_optax.methods.kfac.thor import thor
from kfac_optax.methods.kfac.tkfac import tkfac
from kfac_optax.methods.kfac.two_level import kfac_two_level
from kfac_optax.methods.kfac.two_level_adaptive import kfac_two_level_adaptive
from kfac_optax.methods.kfac.unitwise import quasi_diagonal, unitwise_natural
from kfac_optax.methods.record import Method
from kfac_optax.methods.sample_space.smw import smw
from kfac_optax.methods.sample_space.spring import spring
from kfac_optax.step_rules.balance import balance_parts
from kfac_optax.step_rules.bound import bound_step
from kfac_optax.step_rules.cold_start import cold_start
from kfac_optax.step_rules.damping import adapt_damping
from kfac_optax.step_rules.graft import graft_norm
from kfac_optax.step_rules.kl_clip import clip_by_kl, kl_scale
from kfac_optax.step_rules.movement import bound_movement
from kfac_optax.step_rules.quadratic_model import quadratic_step, solve_model
from kfac_optax.step_rules.rms import clip_by_rms
from kfac_optax.step_rules.stall import until_stalled
from kfac_optax.step_rules.trust_region import clip_by_trust_region, trust_scale
from kfac_optax.step_rules.weight_decay import add_weight_decay

__version__ = "0.1.0"

__all__ = [
    "CATALOGUE",
    "Bernoulli",
    "Block",
    "Categorical",
    "Coupling",
    "Curvature",
    "Directions",
    "Estimator",
    "HostSchedule",
    "Layer",
    "LayerRows",
    "Layers",
    "Likelihood",
    "LogAmplitude",
    "Method",
    "Normal",
    "Placement",
    "Posterior",
    "SampleJacobian",
    "Sloped",
    "Use",
    "adahessian",
    "adapt_damping",
    "add_weight_decay",
    "axes_table",
    "b_kfac",
    "b_kfac_c",
    "b_r_c",
    "b_r_kfac",
    "backpropagated_metric",
    "balance_parts",
    "blocks_of",
    "bound_movement",
    "bound_step",
    "check_state",
    "clip_by_kl",
    "clip_by_rms",
    "clip_by_trust_region",
    "coarse_correction",
    "coarse_fisher",
    "cold_start",
    "compile_step",
    "coverage",
    "deflated",
    "delayed",
    "describe_state",
    "diagnostics",
    "diagonal",
    "distributed_shampoo",
    "divided_state",
    "ekfac",
    "ekfac_block",
    "embedding",
    "empirical_fisher",
    "esgd",
    "eva",
    "eva_f",
    "eva_s",
    "factor_metric",
    "factors",
    "fisher",
    "foof",
    "foof_block",
    "forward_only",
    "from_log_density",
    "ggn",
    "ggt",
    "gnb_estimator",
    "graft_norm",
    "hylo",
    "hylo_block",
    "influence",
    "ingd",
    "inverse_free",
    "inverse_of_rows",
    "inverse_product",
    "jorge",
    "k_bfgs",
    "k_bfgs_l",
    "kfac",
    "kfac_adaptive",
    "kfac_two_level",
    "kfac_two_level_adaptive",
    "kflr",
    "kl_scale",
    "kpsvd",
    "kpsvd_block",
    "kpsvd_two_block",
    "kronecker",
    "laplace",
    "linear_natural",
    "lissa",
    "log_determinant",
    "low_rank",
    "low_rank_blocks",
    "masked",
    "matrix_labels",
    "mfac",
    "mkor",
    "mkor_block",
    "mkor_h",
    "noisy_kfac",
    "per_equation",
    "problems",
    "prune",
    "pruning_scores",
    "psgd_kron",
    "psgd_lra",
    "quadratic_step",
    "quasi_diagonal",
    "quasi_diagonal_block",
    "rank_one",
    "recurrent",
    "recursive_ggn",
    "refresh_period",
    "rs_kfac",
    "sample_diagonal",
    "sample_params",
    "scale_by_curvature",
    "scale_by_distributed_shampoo",
    "scale_by_eva_s",
    "scale_by_jorge",
    "scale_by_shampoo",
    "scale_by_sketchy",
    "scale_by_soap",
    "scale_by_tnt",
    "self_influence",
    "shampoo",
    "similarity_gate",
    "singd",
    "sketchy",
    "skfac",
    "skfac_block",
    "smw",
    "soap",
    "solve_model",
    "split_kronecker",
    "spring",
    "square_root_product",
    "state_shardings",
    "sua",
    "tap_conv",
    "tap_dense",
    "tap_embedding",
    "tap_scale_shift",
    "tekfac",
    "tekfac_block",
    "testing",
    "thor",
    "tied_embedding",
    "tkfac",
    "tkfac_block",
    "tnt",
    "tonga",
    "trace_gate",
    "tridiagonal",
    "trust_scale",
    "unit_block",
    "unitwise",
    "unitwise_natural",
    "until_stalled",
    "vadam",
    "vogn",
    "whole_state",
]
