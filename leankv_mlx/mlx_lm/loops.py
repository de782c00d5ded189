"""mlx-lm's own loops over a prompt and its reply, which tell the caches where the prompt ends.

From the sizes of the calls alone a prompt read in chunks of 3 looks like a reply, and a reply in
steps of 9 drafts like a prompt.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

from leankv_mlx.cache import Sequences

_MODULE = "mlx_lm.generate"

Loop = Callable[..., Iterator[Any]]


def loop_namespaces() -> list[dict[str, Any]]:
    """Globals of the module that holds the loops; with `python -m` it is there twice."""
    modules = [import_module(_MODULE)]
    main = sys.modules.get("__main__")
    if main and getattr(getattr(main, "__spec__", None), "name", None) == _MODULE:
        modules.append(main)
    return [vars(module) for module in modules]


def telling(original: Loop) -> Loop:
    """mlx-lm's `generate_step`, which tells its caches how long the prompt is."""

    def generate_step(prompt: Any, model: Any, *args: Any, **options: Any) -> Iterator[Any]:
        if options.get("prompt_cache") is None:
            options["prompt_cache"] = _made(model, options.get("max_kv_size"))
        embeddings = options.get("input_embeddings")
        tokens = len(prompt if embeddings is None else embeddings)
        with Sequences.of(options["prompt_cache"]).reading(tokens):
            yield from original(prompt, model, *args, **options)

    return generate_step


def telling_drafts(original: Loop) -> Loop:
    """mlx-lm's `speculative_generate_step`: how many drafts there are at a time, too."""

    def speculative_generate_step(
        prompt: Any, model: Any, draft_model: Any, *args: Any, **options: Any
    ) -> Iterator[Any]:
        if options.get("prompt_cache") is None:
            main, drafts = _made(model), _made(draft_model)
            if len(main) == len(model.layers):  # which is where the loop parts the list
                options["prompt_cache"] = [*main, *drafts]
        step = 1 + options.get("num_draft_tokens", 2)
        with Sequences.of(options.get("prompt_cache") or ()).reading(len(prompt), step):
            yield from original(prompt, model, draft_model, *args, **options)

    return speculative_generate_step


def _made(model: Any, max_kv_size: int | None = None) -> list[Any]:
    from mlx_lm.models.cache import make_prompt_cache

    made: list[Any] = make_prompt_cache(model, max_kv_size)
    return made


def can_rewind(caches: Sequence[Any]) -> bool:
    """mlx-lm's `can_trim_prompt_cache`, for drafts."""
    return Sequences.of(caches).can_rewind()


def rewind(caches: Sequence[Any], tokens: int) -> int:
    """mlx-lm's `trim_prompt_cache`, for drafts.

    Raises:
        DroppedTokensError: see `Sequences.rewind`.
    """
    return Sequences.of(caches).rewind(tokens)


def telling_prompts(original: Any) -> Any:
    """mlx-lm's `PromptProcessingBatch`, which tells its caches that what it reads are prompts."""

    class PromptProcessingBatch(original):  # type: ignore[misc]
        def prompt(self, tokens: Any) -> None:
            with Sequences.of(self.prompt_cache).reading():
                super().prompt(tokens)

    return PromptProcessingBatch


def telling_replies(original: Any) -> Any:
    """mlx-lm's `GenerationBatch`, which begins with the last tokens of the prompts."""

    class GenerationBatch(original):  # type: ignore[misc]
        def __init__(
            self, model: Any, uids: Any, inputs: Any, prompt_cache: Any, *args: Any, **options: Any
        ) -> None:
            for sequence in Sequences.of(prompt_cache):
                sequence.last_of_prompt()
            super().__init__(model, uids, inputs, prompt_cache, *args, **options)

    return GenerationBatch


LOOPS: dict[str, Callable[[Any], Any]] = {
    "generate_step": telling,
    "speculative_generate_step": telling_drafts,
    "PromptProcessingBatch": telling_prompts,
    "GenerationBatch": telling_replies,
    "can_trim_prompt_cache": lambda original: can_rewind,
    "trim_prompt_cache": lambda original: rewind,
}
"""Name in the module -> what makes a replacement of the original. Trimming is for rejected drafts
there: the store of prompts of mlx-lm's server asks elsewhere, and is refused what this may do."""
