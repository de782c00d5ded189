"""What stored tokens are judged by: one file for each scorer.

As of policies, nothing here imports NumPy before it judges.
"""

from leankv_mlx.scorers.queries import Queries
from leankv_mlx.scorers.repeat import Repeat
from leankv_mlx.scorers.scorer import Scorer

SCORERS: dict[str, type[Scorer]] = {scorer.name: scorer for scorer in (Queries, Repeat)}
"""Those that `scores=NAME` chooses from."""

__all__ = ["SCORERS", "Queries", "Repeat", "Scorer"]
