"""How much attention stored tokens get: the queries of a cache, and what they look at.

Which tokens stay is said by `leankv_mlx.policies` and `leankv_mlx.scorers`.
"""

from leankv_mlx.sparsity.observations import Observations, Observed
from leankv_mlx.sparsity.scoring import (
    Exact,
    LargestReceived,
    Stored,
    received,
    significance,
)

__all__ = [
    "Exact",
    "LargestReceived",
    "Observations",
    "Observed",
    "Stored",
    "received",
    "significance",
]
