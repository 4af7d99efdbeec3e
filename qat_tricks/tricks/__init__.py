"""The tricks: one a file, each a plain-PyTorch function and its Lightning callback.

The registry is the Hydra group ``conf/trick``: a trick works also if it is not imported here.
"""

from qat_tricks.trainer.trick import Trick
from qat_tricks.tricks.calibrate import Calibrate, calibrate
from qat_tricks.tricks.correct_bias import CorrectBias, correct_bias
from qat_tricks.tricks.correct_weights import CorrectWeights, correct_weights
from qat_tricks.tricks.dampen_oscillations import DampenOscillations, dampen_oscillations
from qat_tricks.tricks.distill import Distill, distill
from qat_tricks.tricks.equalize import Equalize, equalize
from qat_tricks.tricks.fold_batchnorm import FoldBatchnorm, batchnorms_to_convs, fold_batchnorm
from qat_tricks.tricks.freeze_batchnorm import FreezeBatchnorm, freeze_batchnorm
from qat_tricks.tricks.gptq import Gptq, gptq
from qat_tricks.tricks.learn_scales import LearnScales, learn_scales
from qat_tricks.tricks.learned_rounding import LearnedRounding, learned_rounding
from qat_tricks.tricks.mixed_precision import MixedPrecision, mixed_precision
from qat_tricks.tricks.prune import Prune, prune
from qat_tricks.tricks.prune_channels import PruneChannels, prune_channels
from qat_tricks.tricks.quantize import Quantize, quantize
from qat_tricks.tricks.reestimate_batchnorm import ReestimateBatchnorm, reestimate_batchnorm
from qat_tricks.tricks.restore_batchnorm import RestoreBatchnorm, restore_batchnorm
from qat_tricks.tricks.tune_ranges import TuneRanges, tune_ranges

__all__ = [
    "Calibrate",
    "CorrectBias",
    "CorrectWeights",
    "DampenOscillations",
    "Distill",
    "Equalize",
    "FoldBatchnorm",
    "FreezeBatchnorm",
    "Gptq",
    "LearnScales",
    "LearnedRounding",
    "MixedPrecision",
    "Prune",
    "PruneChannels",
    "Quantize",
    "ReestimateBatchnorm",
    "RestoreBatchnorm",
    "Trick",
    "TuneRanges",
    "batchnorms_to_convs",
    "calibrate",
    "correct_bias",
    "correct_weights",
    "dampen_oscillations",
    "distill",
    "equalize",
    "fold_batchnorm",
    "freeze_batchnorm",
    "gptq",
    "learn_scales",
    "learned_rounding",
    "mixed_precision",
    "prune",
    "prune_channels",
    "quantize",
    "reestimate_batchnorm",
    "restore_batchnorm",
    "tune_ranges",
]
