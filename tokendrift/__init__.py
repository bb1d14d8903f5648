"""TokenDrift: an anti-symmetric drifting loss for discrete diffusion language models (arXiv 2605.19470).

The core is here: the lift, feature maps, drift fields, queues and losses. It needs torch and einops only.
`tokendrift.diffusion`, `models`, `sampling`, `evaluation`, `training` and `demo` are imported by name.
"""

from tokendrift.encoders import map_vocabulary
from tokendrift.errors import TokenDriftError
from tokendrift.features import ConcatenatedFeatures, FeatureMap, IdentityFeatures, PooledFeatures
from tokendrift.field import DriftField, Field, FieldDiagnostics
from tokendrift.image_field import ImageDriftField
from tokendrift.lift import LinearLogits, linear_soft_token_lift, soft_token_lift, straight_through_lift
from tokendrift.loss import Diagnostics, LossOutput, MirrorTeacherLoss, TokenDriftLoss
from tokendrift.pairs import PairDriftLoss, pair_drift
from tokendrift.references import FeatureQueue, guidance_weight

__version__ = "0.1.0"

__all__ = [
    "ConcatenatedFeatures",
    "Diagnostics",
    "DriftField",
    "FeatureMap",
    "FeatureQueue",
    "Field",
    "FieldDiagnostics",
    "IdentityFeatures",
    "ImageDriftField",
    "LinearLogits",
    "LossOutput",
    "MirrorTeacherLoss",
    "PairDriftLoss",
    "PooledFeatures",
    "TokenDriftError",
    "TokenDriftLoss",
    "guidance_weight",
    "linear_soft_token_lift",
    "map_vocabulary",
    "pair_drift",
    "soft_token_lift",
    "straight_through_lift",
]
