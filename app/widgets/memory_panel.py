"""The memory that the cache takes and saves, live."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Sparkline, Static

from leankv_app.format import megabytes
from leankv_app.texts import saving
from leankv_app.widgets.layer_map import LayerMap
from leankv_mlx.engine.events import Loaded, Snapshot

HISTORY = 240


class MemoryPanel(VerticalScroll):
    """`v` changes the map between heatmap and gauges, `d` shows the parts."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("v", "view", "Map view", id="panel.view"),
        Binding("d", "detail", "Details", id="panel.detail"),
    ]

    def __init__(self) -> None:
        super().__init__(id="panel")
        self.border_title = "KV cache"
        self.detail = True
        self._snapshot: Snapshot | None = None
        self._loaded: Loaded | None = None
        self._history: list[float] = []
        self._speed = 0.0  # of the last reply, once it is over too

    def compose(self) -> ComposeResult:
        yield Static("-", id="ratio", markup=False)
        yield Static("", id="bars")
        yield Static("", id="numbers")
        yield Static("bytes in use over time", classes="caption")
        yield Sparkline([], id="history")
        yield Static("", classes="caption", id="map-caption")
        yield LayerMap()

    def on_mount(self) -> None:
        self._caption()

    def loaded(self, event: Loaded) -> None:
        """Another model is ready."""
        self._loaded = event
        self._history.clear()
        self._speed = 0.0

    def memory(self, snapshot: Snapshot) -> None:
        """The cache now."""
        self._snapshot = snapshot
        self._speed = snapshot.speed or self._speed
        self._history = [*self._history, float(snapshot.used)][-HISTORY:]
        if self.is_mounted:
            self._show()

    def action_view(self) -> None:
        """The other view of the map."""
        self.query_one(LayerMap).toggle()
        self._caption()

    def action_detail(self) -> None:
        """Show or hide the parts."""
        self.detail = not self.detail
        self._show()

    def on_resize(self) -> None:
        self._show()

    def _caption(self) -> None:
        mode = self.query_one(LayerMap).mode
        what = "layers x KV heads" if mode == "heatmap" else "layers"
        self.query_one("#map-caption", Static).update(f"{what}, share of fp16")

    def _show(self) -> None:
        snapshot = self._snapshot
        if snapshot is None:
            return
        text, saves = saving(snapshot)
        ratio = self.query_one("#ratio", Static)
        ratio.update(text)
        ratio.set_class(saves, "saves")
        self.query_one("#bars", Static).update(self._bars(snapshot, saves))
        rows = [("tokens", f"{snapshot.tokens:,}"), ("context left", f"{snapshot.context_left:,}")]
        rows.append(("tokens/s", f"{self._speed:.1f}" if self._speed else "-"))
        if snapshot.values_read < 1:
            rows.append(("values read", f"{snapshot.values_read:.0%}"))
        if snapshot.weights_read < 1:
            rows.append(("weights read", f"{snapshot.weights_read:.0%}"))
        if self.detail:
            rows += self._parts(snapshot)
        width = max(20, self._width)
        lines = [
            Content.assemble((name, "dim"), value.rjust(max(1, width - len(name))))
            for name, value in rows
        ]
        self.query_one("#numbers", Static).update(Content("\n").join(lines))
        # From 0 on: alone, the first value would fill its whole height.
        self.query_one("#history", Sparkline).data = [0.0, *self._history]
        self.query_one(LayerMap).show(snapshot.layers)

    @property
    def _width(self) -> int:
        """Columns of a line, beside the scrollbar."""
        return self.scrollable_content_region.width

    def _bars(self, snapshot: Snapshot, saves: bool) -> Content:
        width = max(8, self._width - 16)
        most = max(snapshot.fp16, snapshot.used, 1)
        lines = []
        for name, size, style in (
            ("fp16", snapshot.fp16, "$error"),
            ("now", snapshot.used, "$success" if saves else "$primary"),
        ):
            full = round(size / most * width)
            bar = ("━" * full, style), ("─" * (width - full), "dim")
            lines.append(Content.assemble(f"{name:<5}", *bar, f" {megabytes(size):>10}"))
        return Content("\n").join(lines)

    def _parts(self, snapshot: Snapshot) -> list[tuple[str, str]]:
        parts = [
            ("codes", snapshot.codes),
            ("scales", snapshot.scales),
            ("tables", snapshot.tables),
            ("first and recent", snapshot.exact),
            ("centers", snapshot.centers),
        ]
        if snapshot.other:
            parts.append(("uncompressed", snapshot.other))
        parts += [("allocated", snapshot.allocated), ("process peak", snapshot.process_peak)]
        if self._loaded is not None:
            parts += [("budget", self._loaded.budget), ("weights", self._loaded.weights)]
        return [(name, megabytes(size)) for name, size in parts]
