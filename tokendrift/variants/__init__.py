"""Drift fields that the study compared with that of the paper. None of them did better; they are kept for comparisons.

They are built on the streamed sums of `tokendrift.barycentres`, keep the signature of `tokendrift.Field`, and are
imported from here.
"""

from tokendrift.variants.extended import KERNELS, NORMALIZATIONS, ExtendedDriftField, build_field
from tokendrift.variants.image import ImageDriftField
from tokendrift.variants.sharp import SharpLaplace

__all__ = [
    "KERNELS",
    "NORMALIZATIONS",
    "ExtendedDriftField",
    "ImageDriftField",
    "SharpLaplace",
    "build_field",
]
