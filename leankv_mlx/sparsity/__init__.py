"""Which tokens each KV head keeps: how much attention they get, and policies over that."""

from leankv_mlx.sparsity.observations import Observations, Observed
from leankv_mlx.sparsity.policies import (
    DROP,
    HIGH,
    LOW,
    Budget,
    KeepAll,
    LayerSlots,
    Policy,
    Streaming,
    Threshold,
    policy_of,
)
from leankv_mlx.sparsity.scoring import (
    Exact,
    LargestReceived,
    Stored,
    pooled,
    received,
    significance,
)

__all__ = [
    "DROP",
    "HIGH",
    "LOW",
    "Budget",
    "Exact",
    "KeepAll",
    "LargestReceived",
    "LayerSlots",
    "Observations",
    "Observed",
    "Policy",
    "Stored",
    "Streaming",
    "Threshold",
    "policy_of",
    "pooled",
    "received",
    "significance",
]
