"""What the runs of mlx-lm's commands have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any, NoReturn

from leankv_mlx.codec.space import Learned
from leankv_mlx.config import UNCOMPRESSED, CompressionConfig, parse_kv
from leankv_mlx.errors import UsageError
from leankv_mlx.kernels import resolve_backend
from leankv_mlx.mlx_lm.attachment import Attachment, attach, backend_of, why_not
from leankv_mlx.mlx_lm.flags import add_flags
from leankv_mlx.mlx_lm.group import is_first, machines_of, summed
from leankv_mlx.mlx_lm.loading import (
    LoadedModel,
    fingerprint,
    load_from,
    load_part,
    resolve_model,
)
from leankv_mlx.mlx_lm.patches import printing, replaced
from leankv_mlx.mlx_lm.projecting import is_native
from leankv_mlx.mlx_lm.usage import Usage, measure, summary_line
from leankv_mlx.settings import Named, Sparse

BARE = "leankv"
"""`--kv` without a setting."""
FINGERPRINT = "leankv_model"
"""What a prompt cache file's metadata calls the model that it was made with."""
_IDLE_BESIDE_KV = {"kv_bits": "--kv-bits", "max_kv_size": "--max-kv-size"}
"""Flags of mlx-lm that would do nothing, because attach decides which caches there are."""

Method = Callable[..., Any]
"""What is called instead of a function of mlx-lm, with the original first."""


class Session:
    """One run of a command of mlx-lm: what was loaded, attached and cached in it.

    Args:
        prog: what the user typed, for messages.
    """

    def __init__(self, prog: str) -> None:
        self.prog = prog
        self.args = argparse.Namespace()
        self.config: CompressionConfig | None = None
        self.main_model: LoadedModel | None = None
        self.fingerprint = ""  # of the main model
        self.attachments: list[Attachment] = []
        self.caches: list[list[Any]] = []
        self.machines = 1  # that hold the model
        self._counted = Usage()  # of all of them, after the last reply

    # Before the run: the flags.

    def prepare(self, parser: argparse.ArgumentParser, default_kv: str) -> None:
        """Add our flags to a parser of mlx-lm, and our checks to its `parse_args`."""
        self.add_flags(parser, default_kv)
        original = parser.parse_args

        def parse_args(*args: Any, **kwargs: Any) -> Any:
            found = original(*args, **kwargs)
            self.accept(found)
            return found

        def error(message: str) -> NoReturn:
            raise UsageError(f"{message}; see {self.prog} --help.")

        vars(parser).update(parse_args=parse_args, error=error)

    def add_flags(self, parser: argparse.ArgumentParser, default_kv: str) -> None:
        """Add our flags to a parser of mlx-lm."""
        add_flags(parser, default_kv)

    def accept(self, args: argparse.Namespace) -> None:
        """Read `--kv` and check the flags that it has to do with.

        Raises:
            UsageError: the flags contradict each other or are not understood.
        """
        self.args = args
        self.config = parse_kv(args.kv)
        if self.config is None:
            return
        resolve_backend(self.config.backend)
        is_native(self.config.projections)
        for name, flag in _IDLE_BESIDE_KV.items():
            if getattr(args, name, None) is not None:
                raise UsageError(
                    f"{flag} does nothing beside --kv {args.kv}; "
                    f"drop it, or use --kv {UNCOMPRESSED}."
                )

    # During the run: what stands in for functions that mlx-lm's commands call.

    @property
    def methods(self) -> dict[str, Method]:
        """Name in the command's module -> what is called instead."""
        return {
            "load": self.load,
            "sharded_load": self.sharded_load,
            "stream_generate": self.stream_generate,
        }

    def load(self, original: Callable[..., Any], name: str, *args: Any, **options: Any) -> Any:
        """mlx-lm's `load`, with our errors; the model comes back attached."""
        with_config = options.pop("return_config", False)
        path = resolve_model(name)
        projections = self.config.projections if self.config else "auto"
        loaded = load_from(lambda p, **o: original(p, *args, **o), path, projections, **options)
        self._attach(loaded.model, self.is_draft(name))
        if self.main_model is None:  # the draft model comes second
            self.main_model = LoadedModel(*loaded, path)
            self.fingerprint = fingerprint(path)
            self.check_model(name, self.main_model)
        return loaded if with_config else loaded[:2]

    def is_draft(self, name: str) -> bool:
        """Whether the model that is loaded by this name is to draft for the main one."""
        return self.main_model is not None and name == getattr(self.args, "draft_model", None)

    def sharded_load(
        self,
        original: Callable[..., Any],
        name: str,
        pipeline_group: Any = None,
        tensor_group: Any = None,
        **options: Any,
    ) -> Any:
        """mlx-lm's `sharded_load`, for one of several machines; its part comes back attached."""
        with_config = options.pop("return_config", False)
        groups = pipeline_group, tensor_group
        loaded = load_part(
            lambda path, **given: original(path, *groups, **given),
            name,
            pipeline_group is not None,
            self.config.projections if self.config else "auto",
            **options,
        )
        self._attach(loaded.model)
        self.machines = machines_of(loaded.model)
        return loaded if with_config else loaded[:2]

    def _attach(self, model: Any, draft: bool = False) -> None:
        if self.config is not None:
            config, learned = self.config, self.learned
            if draft:  # what was learned is of one model, and a draft is checked by the other
                config = replace(config, sparse=Sparse(), mask=Named(), basis=Named())
                learned = None
            self.keep(attach(model, config, learned=learned).start())

    @property
    def learned(self) -> list[Learned] | None:
        """The mask or basis of the main model, by layer; None for what the settings name."""
        return None

    def keep(self, attachment: Attachment) -> None:
        """A model was attached; it stays so until the run ends."""
        self.attachments.append(attachment)

    def check_model(self, name: str, loaded: LoadedModel) -> None:
        """The main model, that was asked for by this name, is there: check what has to fit it."""

    @property
    def context(self) -> dict[str, Any]:
        """The main model's configuration."""
        return self.main_model.config if self.main_model else {}

    def make_prompt_cache(self, original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """mlx-lm's `make_prompt_cache`; the list is kept, so that its bytes can be counted."""
        made = original(*args, **options)
        self.caches.append(made)
        return made

    def stream_generate(
        self, original: Callable[..., Any], *args: Any, **options: Any
    ) -> Iterator[Any]:
        """mlx-lm's `stream_generate`, after which several machines count what all of them hold: at
        the end of the process one of them may be gone."""
        yield from original(*args, **options)
        if self.machines > 1:
            self._counted = summed(self._usage(), "used", "fp16", "allocated")

    def _usage(self) -> Usage:
        """What the caches of this machine hold."""
        caches = self.caches or [attachment.caches for attachment in self.attachments]
        return sum(map(measure, caches), Usage())

    # After the run.

    def close(self) -> None:
        """Detach every model."""
        for attachment in reversed(self.attachments):
            attachment.stop()

    def summary(self) -> str | None:
        """The line that ends a run; None if it made no cache, or another machine tells it."""
        caches = self.caches or [attachment.caches for attachment in self.attachments]
        backend = backend_text(self.attachments[0]) if self.attachments else UNCOMPRESSED
        if self.machines > 1:
            if not self._counted.tokens or not is_first():
                return None
            each = " with a budget each" if self.config and self.config.policy.limit else ""
            return f"{summary_line(self._counted, backend)}, {self.machines} machines{each}"
        if not any(caches):
            return None
        read = self.attachments[0].weights_read if self.attachments else 1.0
        return summary_line(self._usage(), backend, read)


def backend_text(attachment: Attachment) -> str:
    """For messages."""
    reason = why_not(attachment)
    return backend_of(attachment) + (f" (nothing to compress: {reason})" if reason else "")


Guard = Callable[[Callable[[], Any]], Any]
"""Calls a function and decides what becomes of the errors that it raises."""


@contextmanager
def hooked(
    module: ModuleType, session: Session, guard: Guard = lambda call: call()
) -> Iterator[None]:
    """A module that runs a command of mlx-lm, with the session's functions; restored on exit."""

    def bound(method: Method, original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: guard(lambda: method(original, *args, **options))

    with ExitStack() as stack:
        stack.callback(session.close)
        stack.enter_context(printing(module))
        for name, method in session.methods.items():
            if (original := getattr(module, name, None)) is not None:
                stack.enter_context(replaced(module, name, bound(method, original)))
        yield


def print_summary(session: Session) -> None:
    """After the output of the run, on stderr."""
    summary = session.summary()
    sys.stdout.flush()
    if summary is not None:
        print(summary, file=sys.stderr)
