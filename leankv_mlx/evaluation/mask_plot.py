"""The look at a mask of key channels as a picture, to be read on light and on dark ground."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from leankv_mlx.codec.format import TILE, padded
from leankv_mlx.evaluation.masks import Floats, Heads, Look, Sizes
from leankv_mlx.terminal import line

_INK = "#767676"
"""As far from white as from black."""
_SERIES = "#2b8cbe", "#d95f02", "#7570b3"
_SHOWN = 16
_STYLE: Any = {
    "text.color": _INK,
    "text.parse_math": False,  # names may have a $
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.facecolor": "none",
    "svg.hashsalt": "leankv",  # the same look is the same file
}


def plot_look(look: Look, path: Path) -> None:
    """Write the picture; its kind follows from the file's name."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(11, 9 if look.sizes else 4.5), layout="constrained")
        panels = figure.subplots(2 if look.sizes else 1, 2, squeeze=False)
        _kept_by_head(panels[0][0], look)
        _kept_by_frequency(panels[0][1], look)
        if look.sizes is not None:
            _worth_and_sizes(panels[1][0], look, look.sizes)
        if look.heads is not None:
            _ranking(panels[1][1], look, look.heads)
        figure.suptitle(line(f"{look.title}, a mask of the keys of {look.masks.name}"))
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
        figure.savefig(path, transparent=True, metadata=metadata)


def _kept_by_head(axes: Any, look: Look) -> None:
    from matplotlib import colormaps

    groups, dim = look.masks.groups, look.masks.alphas.shape[-1]
    most = padded(dim) // TILE
    colors = colormaps["viridis"].resampled(most + 1)
    image = axes.imshow(groups, aspect="auto", vmin=-0.5, vmax=most + 0.5, cmap=colors)
    axes.set(title="Channels kept", xlabel="KV head", ylabel="layer")
    axes.set_xticks(range(groups.shape[1]))
    bar = axes.figure.colorbar(image, ax=axes, ticks=range(most + 1))
    bar.set_ticklabels([str(min(TILE * n, dim)) for n in range(most + 1)])


def _kept_by_frequency(axes: Any, look: Look) -> None:
    shares = look.by_pair()
    axes.bar(np.arange(len(shares)), 100 * shares, color=_SERIES[0])
    axes.set(title="Kept by RoPE frequency", xlabel="pair, fastest first", ylabel="% of channels")
    axes.set_ylim(0, 100)


def _worth_and_sizes(axes: Any, look: Look, sizes: Sizes) -> None:
    """By RoPE pair, mean over all heads; sizes beside the mean of their head, so that no layer
    outweighs the others."""
    axes.set(title="Worth and size of channels", xlabel="pair, fastest first")
    axes.set_ylabel("worth, 0 to 1")
    axes.set_ylim(0, 1.05)
    beside = axes.twinx()
    beside.set_ylabel("size beside the head's mean")
    lines = axes.plot(_by_pair(look.masks.alphas, look), color=_SERIES[0], label="worth")
    for name, side, color in zip(
        ("queries", "keys"), (sizes.queries, sizes.keys), _SERIES[1:], strict=True
    ):
        relative = side / np.maximum(side.mean(axis=-1, keepdims=True), 1e-9)
        lines += beside.plot(_by_pair(relative, look), "--", color=color, label=name)
    beside.set_ylim(bottom=0)
    axes.legend(handles=lines, fontsize="small")


def _by_pair(values: Floats, look: Look) -> Floats:
    """[layers, H, head_dim] -> mean of each RoPE pair, [pairs]."""
    means: Floats = values[..., look.pairs].mean(axis=(0, 1, 3))
    return means


def _ranking(axes: Any, look: Look, heads: Heads) -> None:
    shown = heads.ranked()[:_SHOWN]
    losses = [heads.loss[layer, head] for layer, head in shown]
    names = [f"{layer}.{head} ({look.masks.channels[layer, head]})" for layer, head in shown]
    axes.barh(range(len(shown)), losses, color=_SERIES[0], tick_label=names)
    axes.invert_yaxis()
    axes.set(title="Loss without one head's middle tokens", xlabel="nats per token of the replies")
    axes.set_ylabel("layer.head (channels kept)")
