"""Everything that touches mlx-lm: attaching to a model, loading, the command line."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leankv_mlx.mlx_lm.attachment import Attachment, LayerReport, attach, make_caches
    from leankv_mlx.mlx_lm.cache_files import PromptCache, load_prompt_cache, save_prompt_cache
    from leankv_mlx.mlx_lm.loading import LoadedModel, check_context, load
    from leankv_mlx.mlx_lm.usage import Usage, measure

_MODULES = {
    "Attachment": "attachment",
    "LayerReport": "attachment",
    "LoadedModel": "loading",
    "PromptCache": "cache_files",
    "Usage": "usage",
    "attach": "attachment",
    "check_context": "loading",
    "load": "loading",
    "load_prompt_cache": "cache_files",
    "make_caches": "attachment",
    "measure": "usage",
    "save_prompt_cache": "cache_files",
}

__all__ = [
    "Attachment",
    "LayerReport",
    "LoadedModel",
    "PromptCache",
    "Usage",
    "attach",
    "check_context",
    "load",
    "load_prompt_cache",
    "make_caches",
    "measure",
    "save_prompt_cache",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
