"""Many sequences at once: what they hold together, and the prompts that are kept for the next."""

from leankv_mlx.serving.held import Held, held
from leankv_mlx.serving.prompts import PromptStore

__all__ = ["Held", "PromptStore", "held"]
