"""TokenDrift: an anti-symmetric drifting loss for discrete diffusion language models (arXiv 2605.19470).

The core is here: the lift, feature maps, the drift field, queues and losses. It needs torch and einops only.
`tokendrift.diffusion`, `models`, `sampling`, `evaluation`, `training`, `variants` and `demo` are imported by name.
"""

from tokendrift.errors import TokenDriftError
from tokendrift.features import ConcatenatedFeatures, FeatureMap, PooledFeatures
from tokendrift.field import DriftField, Field, FieldDiagnostics
from tokendrift.lift import LinearLogits, linear_soft_token_lift, soft_token_lift
from tokendrift.loss import MirrorTeacherLoss, TokenDriftLoss
from tokendrift.pairs import PairDriftLoss
from tokendrift.references import FeatureQueue

__version__ = "0.1.0"

__all__ = [
    "ConcatenatedFeatures",
    "DriftField",
    "FeatureMap",
    "FeatureQueue",
    "Field",
    "FieldDiagnostics",
    "LinearLogits",
    "MirrorTeacherLoss",
    "PairDriftLoss",
    "PooledFeatures",
    "TokenDriftError",
    "TokenDriftLoss",
    "linear_soft_token_lift",
    "soft_token_lift",
]
