"""Which stored tokens stay, and in which tier: one file for each policy.

A policy is part of the configuration, which is read before the first screen of the chat, so nothing
here imports NumPy before it plans.
"""

from leankv_mlx.policies.budget import Budget
from leankv_mlx.policies.keep_all import KeepAll
from leankv_mlx.policies.policy import DROP, HIGH, LOW, Dropping, LayerSlots, Policy
from leankv_mlx.policies.streaming import Streaming
from leankv_mlx.policies.threshold import Threshold

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (KeepAll, Threshold, Budget, Streaming)
}
"""Those that `policy=NAME` chooses from."""

__all__ = [
    "DROP",
    "HIGH",
    "LOW",
    "POLICIES",
    "Budget",
    "Dropping",
    "KeepAll",
    "LayerSlots",
    "Policy",
    "Streaming",
    "Threshold",
]
