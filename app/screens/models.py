"""Models: the list of models.toml and what the hub's cache has, with what fits this machine.

Those that the chat offers come first, the bundled one, which cannot chat, last of the list.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from leankv_app.format import megabytes
from leankv_app.guard import Guarded
from leankv_app.typed import path_of

if TYPE_CHECKING:
    from leankv_mlx.engine.catalogue import CatalogueEntry


@dataclass(frozen=True, slots=True)
class Choice:
    """A model to choose: `model` is what is loaded, `kv` the profile to begin with."""

    model: str
    kv: str


class ModelsScreen(Guarded, ModalScreen[Choice | None]):
    """Gives the model to load."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Close", id="models.close")
    ]

    def __init__(self) -> None:
        super().__init__()
        self._memory = memory_size()
        self._choices: list[Choice] = []

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog large") as box:
            box.border_title = f"Models · tokens that fit into {megabytes(self._memory)} of memory"
            yield OptionList(Option("looking …", disabled=True), id="list", markup=False)
            yield Input(
                placeholder="or a hub id (owner/name), a folder, or a .gguf file", id="other"
            )
            yield Static("Enter load · Tab to the other field · Esc close", classes="hint")

    def on_mount(self) -> None:
        self._look()

    @work(thread=True)
    def _look(self) -> None:
        rows = rows_for(self._memory)
        self.app.call_from_thread(self._fill, rows)

    def _fill(self, rows: list[tuple[Choice, Content, bool]]) -> None:
        options = self.query_one(OptionList)
        options.clear_options()
        self._choices = [choice for choice, _, _ in rows]
        options.add_options([Option(line, disabled=not fits) for _, line, fits in rows])
        options.action_first()  # that fits
        options.focus()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        if self._choices:
            self.dismiss(self._choices[event.option_index])

    def on_input_submitted(self, event: Input.Submitted) -> None:
        if event.value.strip():
            self.dismiss(Choice(path_of(event.value), ""))


def memory_size() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def rows_for(memory: int) -> list[tuple[Choice, Content, bool]]:
    """A line for every model, and whether it fits. Takes a moment: it imports mlx."""
    from leankv_mlx.engine.catalogue import catalogue
    from leankv_mlx.engine.plan import plan

    cached = cached_models()
    rows = []
    for entry in sorted(catalogue(), key=_place):
        planned = {row.profile: row for row in plan(entry, memory).rows}
        fp16 = planned["fp16"].tokens
        best = planned[entry.kv].tokens if entry.kv in planned else fp16
        here = "here" if not entry.repo or entry.repo in cached else "download"
        cached.discard(entry.repo)
        fits = best >= 1024
        room = f"{best:>7,} (fp16 {fp16:,})" if fits else "does not fit"
        line = Content.assemble(
            f"{entry.name:<18}", (f"{megabytes(entry.weights):>9} ", "dim"),
            (f"{here:<9}", "$success" if here == "here" else "dim"), (room, "" if fits else "dim"),
        )  # fmt: skip
        rows.append((Choice(entry.repo, entry.kv), line, fits))
    for repo in sorted(cached):
        rows.append((Choice(repo, ""), Content.assemble(repo, ("  here", "$success")), True))
    return rows


def _place(entry: CatalogueEntry) -> int:
    if not entry.repo:
        return 2
    return 0 if entry.offered else 1


def cached_models() -> set[str]:
    """Hub ids of models in the local hub cache that mlx-lm may load."""
    try:
        from huggingface_hub import scan_cache_dir

        repos = scan_cache_dir().repos
    except Exception:  # no cache, or one that another program is changing
        return set()
    return {
        repo.repo_id
        for repo in repos
        if repo.repo_type == "model"
        and any(
            file.file_name.startswith("model") and file.file_name.endswith(".safetensors")
            for revision in repo.revisions
            for file in revision.files
        )
    }
