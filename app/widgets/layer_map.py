"""Layers x KV heads: how many bytes each takes, as a share of what fp16 would take."""

from __future__ import annotations

from collections.abc import Sequence

from textual.color import Color, Gradient
from textual.content import Content
from textual.style import Style
from textual.widgets import Static

from leankv_mlx.engine.events import LayerUse

VIEWS = ("heatmap", "gauge")
MAX_ROWS = 16


class LayerMap(Static):
    """Two views: a heatmap of layers and heads, and a gauge per layer."""

    def __init__(self) -> None:
        super().__init__(id="layer-map")
        self.mode = VIEWS[0]
        self._layers: Sequence[LayerUse] = ()

    def show(self, layers: Sequence[LayerUse]) -> None:
        """The cache now."""
        self._layers = layers
        self._draw()

    def toggle(self) -> None:
        """The other view."""
        self.mode = VIEWS[1 - VIEWS.index(self.mode)]
        self._draw()

    def on_resize(self) -> None:
        self._draw()

    def _draw(self) -> None:
        filled = [layer for layer in self._layers if layer.fp16]
        if not filled:
            self.update(Content.styled("no tokens yet", "dim"))
        elif self.mode == "heatmap":
            self.update(self._heatmap())
        else:
            self.update(self._gauges())

    def _gradient(self) -> Gradient:
        variables = self.app.theme_variables
        low, high = Color.parse(variables["success"]), Color.parse(variables["error"])
        return Gradient((0.0, low), (0.5, low.blend(high, 0.5)), (1.0, high))

    def _heatmap(self) -> Content:
        """Two layers in a line of half blocks; heads are as wide as there is room."""
        gradient, ground = self._gradient(), self.background_colors[1]
        heads = max((len(layer.heads) for layer in self._layers), default=1) or 1
        wide = max(1, min(4, (self.size.width - 7) // heads))
        shown = max(1, (self.size.width - 7) // wide)
        step = -(-len(self._layers) // (2 * MAX_ROWS))  # layers in half a line
        lines = []
        for first in range(0, len(self._layers), 2 * step):
            upper = self._layers[first]
            lower = self._layers[first + step] if first + step < len(self._layers) else None
            cells = [Content.styled(f"{first:>3} ", "dim")]
            for head in range(min(heads, shown)):
                top = _color(upper, head, gradient, ground)
                bottom = _color(lower, head, gradient, ground)
                cells.append(Content.styled("▀" * wide, Style(foreground=top, background=bottom)))
            lines.append(Content("").join(cells))
        return Content("\n").join(lines)

    def _gauges(self) -> Content:
        gradient = self._gradient()
        width = max(4, self.size.width - 9)
        step = -(-len(self._layers) // (2 * MAX_ROWS))
        lines = []
        for first in range(0, len(self._layers), step):
            layer = self._layers[first]
            share = layer.used / layer.fp16 if layer.fp16 else 0.0
            full = round(min(1.0, share) * width)
            lines.append(
                Content("").join(
                    [
                        Content.styled(f"{first:>3} ", "dim"),
                        Content.styled("━" * full, Style(foreground=gradient.get_color(share))),
                        Content.styled("─" * (width - full), "dim"),
                        Content(f" {share:4.0%}"),
                    ]
                )
            )
        return Content("\n").join(lines)


def _color(layer: LayerUse | None, head: int, gradient: Gradient, ground: Color) -> Color:
    if layer is None or head >= len(layer.heads) or not layer.fp16:
        return ground
    return gradient.get_color(min(1.0, layer.heads[head] * len(layer.heads) / layer.fp16))
