"""mlx-lm's `BatchGenerator`, with cuts in prompts that are read, and faults that spare replies.

This is the one module that knows how it keeps its sequences.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from leankv_mlx.mlx_lm.serving.request import Request


class Batch:
    """The requests that run: some are being read, the others replied to.

    Args:
        args: of mlx-lm's server.
        stream: of the thread that runs it.
    """

    def __init__(self, model: Any, args: Any, stream: Any) -> None:
        from mlx_lm.generate import BatchGenerator

        self._generator = BatchGenerator(
            model,
            completion_batch_size=args.decode_concurrency,
            prefill_batch_size=args.prompt_concurrency,
            prefill_step_size=args.prefill_step_size,
            stream=stream,
        )
        self._prompts = self._generator._prompt_batch
        self._read = self._prompts.prompt
        self._fault: Exception | None = None
        # An instance's own: parts that are split off to be replied to have the class's.
        self._prompts.prompt = self._guarded

    def insert(self, request: Request, caches: list[Any] | None) -> int:
        """Begin with a request behind what `caches` holds of its prompt; returns its uid."""
        prompt, reused = request.prompt, request.reused
        segments, request.types = rest_of(request.segments, request.types, reused)
        (uid,) = self._generator.insert_segments(
            segments=[segments],
            max_tokens=[request.max_tokens],
            caches=[caches],
            all_tokens=[prompt[:reused]],
            samplers=[request.sampler],
            logits_processors=[request.processors],
            stop_sequences=[request.stops],
        )
        return int(uid)

    def step(self) -> tuple[list[Any], list[Any], tuple[list[int], Exception] | None]:
        """One more token of each reply, and one more part of each prompt.

        Returns:
            mlx-lm's responses about prompts, those of replies, and the uids of the prompts that
            could not be read with the error, whose responses are not among them.
        """
        self._fault = None
        prompts, replies = self._generator.next()
        if self._fault is None:
            return prompts, replies, None
        failed = list(self._prompts.uids)
        self.remove(failed)
        return [r for r in prompts if r.uid not in failed], replies, (failed, self._fault)

    def _guarded(self, tokens: list[list[int]]) -> None:
        """Replies have their token by then, which an error would take with it."""
        try:
            self._read(tokens)
        except Exception as error:
            self._fault = error

    def cut(self, request: Request, at: int) -> None:
        """Stop reading a prompt after its first `at` tokens, if it has not come so far; what ends
        there is then stored."""
        segments, before = self._segments(request.uid), request.tokens
        for place, segment in enumerate(segments):
            inside = at - before
            before += len(segment)
            if 0 < inside < len(segment):
                segments[place : place + 1] = [segment[:inside], segment[inside:]]
                request.types.insert(place, "system")  # several begin with it
                return

    def _segments(self, uid: int) -> list[list[int]]:
        """What is left of a prompt; to be changed in place."""
        waiting = {sequence[0]: sequence[1] for sequence in self._generator._unprocessed_sequences}
        processing = self._generator._currently_processing
        read = {u: sequence[0] for u, sequence in zip(self._prompts.uids, processing, strict=True)}
        found: list[list[int]] = (waiting | read).get(uid, [])
        return found

    def extract(self, uid: int) -> tuple[list[Any], list[int]]:
        """A copy of a request's caches, which shares their blocks, and the tokens in it."""
        caches, tokens = self._generator.extract_cache([uid])[uid]
        return caches, list(tokens)

    def remove(self, uids: Iterable[int]) -> None:
        """End requests; others that are no longer there are no error."""
        self._generator.remove(list(uids))

    @property
    def lists(self) -> list[list[Any]]:
        """The caches of all that runs, for whoever counts them."""
        waiting = [sequence[3] for sequence in self._generator._unprocessed_sequences]
        replies = self._generator._generation_batch
        return [*waiting, self._prompts.prompt_cache, replies.prompt_cache]

    def close(self) -> None:
        """End; the requests are gone."""
        del self._prompts.prompt  # it refers to this object
        self._generator.close()


def rest_of(
    segments: list[list[int]], types: list[str], reused: int
) -> tuple[list[list[int]], list[str]]:
    """The segments of a prompt and their types without its first `reused` tokens."""
    left, kinds = [], []
    for segment, kind in zip(segments, types, strict=True):
        if reused < len(segment):
            left.append(segment[reused:])
            kinds.append(kind)
        reused = max(0, reused - len(segment))
    return left, kinds
