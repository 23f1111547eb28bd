"""Proximal Backpropagation (Frerix, Möllenhoff, Moeller, Cremers, ICLR 2018) as torch.nn layers."""

from proxprop.convert import ConversionReport, LayerReport, convert, param_groups, revert
from proxprop.deferred import DeferredStep, defer
from proxprop.diagnose import Diagnosis, LayerDiagnosis, diagnose, suggest_tau
from proxprop.generator import proxprop_module_generator
from proxprop.layers import (
    ProxPropConv1d,
    ProxPropConv2d,
    ProxPropConv3d,
    ProxPropConvTranspose1d,
    ProxPropConvTranspose2d,
    ProxPropConvTranspose3d,
    ProxPropEmbedding,
    ProxPropLinear,
)
from proxprop.rows import row_mask

__all__ = [
    # Layers
    "ProxPropLinear",
    "ProxPropConv1d",
    "ProxPropConv2d",
    "ProxPropConv3d",
    "ProxPropConvTranspose1d",
    "ProxPropConvTranspose2d",
    "ProxPropConvTranspose3d",
    "ProxPropEmbedding",
    # A layer of any class
    "proxprop_module_generator",
    # A whole model
    "convert",
    "revert",
    "param_groups",
    "ConversionReport",
    "LayerReport",
    # One step of many passes
    "defer",
    "DeferredStep",
    # Padding
    "row_mask",
    # What its layers do
    "diagnose",
    "suggest_tau",
    "Diagnosis",
    "LayerDiagnosis",
]
