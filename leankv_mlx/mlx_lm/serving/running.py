"""The requests that run: what a step gives each of them, what they hold, and who fails."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx

from leankv_mlx.errors import LeanKVError, ServingError
from leankv_mlx.faults import described
from leankv_mlx.mlx_lm.serving.batch import Batch
from leankv_mlx.mlx_lm.serving.report import Counts
from leankv_mlx.mlx_lm.serving.request import Request
from leankv_mlx.mlx_lm.serving.served import Served
from leankv_mlx.serving import PromptStore, held
from leankv_mlx.serving.admission import Balance
from leankv_mlx.serving.sharing import WORTH, Reading, common


class Running:
    """Those of one model.

    Args:
        generator: mlx-lm's `ResponseGenerator`.
        summary: the line of the log about the caches of a request that was answered.

    Attributes:
        changes: goes up with all that decides who else fits.
    """

    def __init__(
        self,
        served: Served,
        store: PromptStore,
        generator: Any,
        counts: Counts,
        summary: Callable[[list[Any]], str],
    ) -> None:
        self.changes = 0
        self._served, self._store, self._generator = served, store, generator
        self._counts, self._summary = counts, summary
        self._stream = mx.default_stream(mx.default_device())
        self._requests: dict[int, Request] = {}
        self._batch: Batch | None = None

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def requests(self) -> list[Request]:
        """All of them."""
        return list(self._requests.values())

    @property
    def reading(self) -> list[tuple[Request, Reading]]:
        """Those whose prompts are being read."""
        return [(x, x.reading) for x in self._requests.values() if x.reading is not None]

    @property
    def lists(self) -> list[list[Any]]:
        """Their caches."""
        return self._batch.lists if self._batch is not None else []

    def balance(self, beside: list[Any] | None) -> Balance:
        """Bytes as they are now.

        Args:
            beside: caches of what is about to run, too.
        """
        lists = [*self.lists, beside or []]
        growth = 0
        for request in self._requests.values():
            has = self._served.own(request.tokens, request.tokens - request.kept)
            growth += max(0, request.most - has)
        return Balance(
            limit=self._served.limit,
            held=self._store.held(lists).used,
            running=held(lists).used,
            growth=growth,
        )

    # Who runs.

    def start(self, request: Request, caches: list[Any] | None) -> None:
        """Begin with a request behind the `request.reused` tokens of its prompt in `caches`."""
        if self._batch is None:
            self._batch = Batch(self._served.model, self._generator.cli_args, self._stream)
        request.tokens = request.kept = request.context.prompt_cache_count = request.reused
        request.reading = Reading(request.prompt, request.reused)
        request.uid = self._batch.insert(request, caches)
        self._requests[request.uid] = request
        self.changes += 1
        self._generator._log_cache_stats()

    def cut(self, uid: int, places: Iterable[int]) -> None:
        """Have the reading of a prompt stop at these places."""
        for place in places:
            assert self._batch is not None
            self._batch.cut(self._requests[uid], place)

    def drop(self, requests: Iterable[Request]) -> None:
        """End requests, whose rows are free at once; does nothing for those that do not run."""
        uids = [x.uid for x in requests if self._requests.get(x.uid) is x]
        if self._batch is not None and uids:
            self._batch.remove(uids)
        for uid in uids:
            del self._requests[uid]
        self.changes += len(uids)

    def close(self) -> None:
        """No more steps; what still runs is gone."""
        self._requests.clear()
        if self._batch is not None:
            self._batch.close()
        self._batch = None

    # What a step gives.

    def step(self) -> list[Request]:
        """One more token of each reply and one more part of each prompt.

        Returns:
            Requests that are to be read again, each by itself: prompts could not be read together,
            and that tells whose fault it is.

        Raises:
            Exception: a step failed that cannot be divided; what runs has to `start_anew`.
        """
        assert self._batch is not None
        prompts, replies, fault = self._batch.step()
        again = self._spared(*fault) if fault is not None else []
        for response in prompts:
            self._guarded(response, self._has_read)
        for response in replies:
            self._guarded(response, self._has_replied)
        return again

    def _guarded(self, response: Any, handle: Callable[[Request, Any], None]) -> None:
        """An error about one request is that request's."""
        request = self._requests.get(response.uid)
        if request is None:
            return  # it failed in this step
        try:
            if request.error is not None:
                raise request.error
            handle(request, response)
        except Exception as error:
            self.fail([request], error)

    def _has_read(self, request: Request, response: Any) -> None:
        assert self._batch is not None and request.reading is not None
        read = request.reused + response.progress[0]
        self._counts.read += read - request.tokens
        request.tokens = request.reading.read = read
        if response.end_of_prompt:
            request.reading = None
            self.changes += 1
        elif response.end_of_segment and request.types:
            kind = request.types.pop(0)
            # A whole prompt is kept with its reply, and until then it can be had from here. What
            # cannot be cut off a longer one is kept by itself.
            self.keep(request, kind, whole=bool(request.types))
        request.client.put(response.progress)

    def _has_replied(self, request: Request, response: Any) -> None:
        server, text, reason = self._generator.server, request.detokenizer, response.finish_reason
        request.tokens += 1
        self._counts.generated += 1
        if reason != "stop":  # whose token is no text
            text.add_token(response.token)
        if reason is not None:
            del self._requests[request.uid]
            self._counts.finished += 1
            logging.info(self._summary(response.prompt_cache))
            self._keep(list(response.all_tokens), response.prompt_cache, "assistant")
            text.finalize()
        top = server._format_top_logprobs(
            response.logprobs, request.top_logprobs, self._served.tokenizer
        )
        logprob = response.logprobs[response.token].item()
        request.client.put(server.Response(text.last_segment, response.token, logprob, reason, top))
        if reason is not None:
            request.client.put(None)

    def keep(self, request: Request, kind: str, whole: bool) -> None:
        """Have the store keep a copy of what a request has read or replied so far.

        Args:
            kind: what the store calls it.
            whole: whether to keep it if a beginning of it can be cut off.
        """
        assert self._batch is not None
        caches, tokens = self._batch.extract(request.uid)
        if whole or not all(cache.is_trimmable() for cache in caches):
            self._keep(tokens, caches, kind)
            request.kept = len(tokens)

    def nearest(self, prompt: list[int]) -> tuple[Request | None, int]:
        """Whoever has read the longest beginning of a prompt, and how long that is."""
        best, longest = None, 0
        for request in self._requests.values():
            length = min(common(request.prompt, prompt), request.tokens, len(prompt) - 1)
            if length > longest:
                best, longest = request, length
        return best, longest

    def leave(self, requests: Iterable[Request]) -> None:
        """End requests nobody waits for any more; what was read for them is kept, while there is
        room: who breaks off often asks again."""
        found = [x for x in requests if self._requests.get(x.uid) is x]
        for request in found:
            if request.tokens - request.kept >= WORTH and request.error is None:
                self.keep(request, "assistant", whole=True)
        self.drop(found)

    def _keep(self, tokens: list[int], caches: list[Any], kind: str) -> None:
        self._store.insert_cache(self._served.key, tokens, caches, cache_type=kind)
        self.changes += 1

    # Who fails.

    def fail(self, requests: list[Request], error: Exception) -> None:
        """End requests with an error, and all others go on."""
        self.drop(requests)
        self._counts.failed += len(requests)
        text = described(error)
        logging.error(f"leankv: error: {len(requests)} of the requests failed: {text}")
        for request in requests:
            request.client.put(error if isinstance(error, LeanKVError) else ServingError(text))

    def _spared(self, uids: list[int], error: Exception) -> list[Request]:
        """Those of the prompts that failed together that get another try."""
        failed = [self._requests[uid] for uid in uids]
        if len(failed) == 1:
            self.fail(failed, error)
            return []
        logging.warning(f"leankv: {len(failed)} prompts are read one by one: {described(error)}")
        for request in failed:
            del self._requests[request.uid]
            request.by_itself, request.reading = True, None
        self.changes += 1
        return failed

    def start_anew(self, error: Exception) -> None:
        """A step failed, and with it all that runs: nobody can tell what it left of the caches, nor
        of those in the store that share their blocks."""
        failed = self.requests
        self._requests.clear()
        self.close()
        self._store.trim_to(n_sequences=0)
        self.fail(failed, error)
        self.changes += 1
        gc.collect()
        mx.clear_cache()
