"""Batch normalization: modules that replace torch's, their functional form, and the conversion of models."""

from steadygrad.nn import functional
from steadygrad.nn.activation_penalty import ActivationPenalty
from steadygrad.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from steadygrad.nn.conversion_report import ConversionReport, conversion_report
from steadygrad.nn.convert import convert_batchnorm, restore_batchnorm
from steadygrad.nn.fusion import Steps, batch_norm_add_relu
from steadygrad.nn.known_blocks import register_block

__all__ = [
    "ActivationPenalty",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "ConversionReport",
    "Steps",
    "batch_norm_add_relu",
    "conversion_report",
    "convert_batchnorm",
    "functional",
    "register_block",
    "restore_batchnorm",
]
