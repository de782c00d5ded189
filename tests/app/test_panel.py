"""The memory panel: the kind of fault is a true number that is shown so that it misleads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.app.harness import LOADED, SNAPSHOT, Driver, drive  # isort: skip

from textual.widgets import Sparkline, Static

from leankv_app.texts import saving
from leankv_app.widgets.message import Notice
from leankv_mlx.engine import Engine
from leankv_mlx.engine.events import Done

SHORT = replace(
    SNAPSHOT, tokens=63, fp16=161_280, codes=0, scales=0, tables=0, exact=322_560, centers=0,
    allocated=322_560, exact_until=100, speed=12.5,
)  # fmt: skip
WIDTH = 35  # of the panel inside of its border, its padding and the scrollbar


def panel_lines(d: Driver) -> list[str]:
    """The panel's lines between its borders."""
    region = d.screen.panel.region
    strips = d.app.screen._compositor.render_strips()
    lines = ["".join(segment.text for segment in strip) for strip in strips]
    return [line[region.x + 2 :][:WIDTH] for line in lines[region.y + 1 : region.bottom - 1]]


SIZES = [(100, 30), (130, 36), (200, 50)]
SHOWN = [
    pytest.param(layers, size, marks=[pytest.mark.slow] * (i != j and (i, j) != (2, 0)))
    for i, layers in enumerate([12, 30, 64])
    for j, size in enumerate(SIZES)
]
"""By default each once, and the most layers where there is the least room for them."""


@pytest.mark.parametrize(("layers", "size"), [(12, (80, 24)), *SHOWN])
def test_values_stand_beside_their_names(
    tmp_path: Path, layers: int, size: tuple[int, int]
) -> None:
    """With a scrollbar too; bars end where the numbers do."""

    async def script(d: Driver) -> None:
        await d.emit(replace(LOADED, model="a/b", layers=layers, budget=999 * 10**9))
        await d.emit(replace(SNAPSHOT, layers=SNAPSHOT.layers[:1] * layers))
        await d.pilot.pause()
        if size[0] < 100:
            assert not d.screen.panel.display
            return
        seen: list[str] = []
        panel = d.screen.panel
        for row in range(int(panel.max_scroll_y) + 1):
            panel.scroll_to(y=row, animate=False)
            await d.pilot.pause()
            seen += panel_lines(d)
        for name, value in (
            ("fp16", "2.74 MB"), ("now", "883.20 kB"), ("tokens", "1,071"),
            ("context left", "7,121"), ("tokens/s", "31.4"), ("codes", "634.88 kB"),
            ("first and recent", "202.24 kB"), ("process peak", "17.84 MB"),
            ("budget", "999.00 GB"), ("weights", "9.48 MB"),
        ):  # fmt: skip
            (line,) = {line for line in seen if line.startswith(f"{name} ")}
            assert line.endswith(f" {value}"), line
            assert len(line) == WIDTH
        d.screen.panel.query_one("LayerMap").toggle()
        await d.pilot.pause()
        for line in panel_lines(d):
            assert "%" not in line or line.endswith("%"), line

    drive(script, tmp_path, size)


def test_a_short_chat_is_said_to_be_exact(tmp_path: Path) -> None:
    """No green "0.50x smaller" where nothing is compressed yet."""

    async def script(d: Driver) -> None:
        await d.emit(replace(LOADED, model="a/b"))
        ratio = d.screen.panel.query_one("#ratio", Static)
        await d.emit(SHORT)
        told = " ".join("".join(panel_lines(d)[:3]).split())
        assert told.startswith("all tokens still exact; saving starts after 100 tokens")
        assert not ratio.has_class("saves")
        assert "smaller" not in d.text
        await d.type("/stats")
        assert "saving starts after 100 tokens" in str(d.screen.query(Notice).last().render())
        plain = ratio.styles.color
        await d.emit(replace(SNAPSHOT, exact_until=100))
        await d.shows("3.10x smaller")
        assert ratio.has_class("saves")
        assert ratio.styles.color != plain

    drive(script, tmp_path, (130, 36))

    async def narrow(d: Driver) -> None:
        await d.loaded()
        await d.emit(SHORT)
        await d.shows("all tokens still exact · 322.56 kB")
        assert "demo model" in d.text.splitlines()[-2]

    drive(narrow, tmp_path)


def test_what_the_compression_is_worth() -> None:
    big = replace(SNAPSHOT, exact_until=100)
    assert saving(replace(SHORT, tokens=0)) == ("no tokens yet", False)
    assert saving(replace(SHORT, exact_until=1))[0] == "2.00x larger than fp16"
    assert saving(replace(big, codes=big.codes + big.fp16)) == ("1.32x larger than fp16", False)
    assert saving(big) == ("3.10x smaller", True)
    assert saving(SNAPSHOT) == ("3.10x smaller", True)  # a recording of an earlier version
    full = replace(SHORT, exact=0, other=161_280, exact_until=0)
    assert saving(full) == ("as large as fp16", False)
    dropped = replace(SHORT, tokens=5000, fp16=12_800_000)  # by a policy; nothing is codes
    assert saving(dropped) == ("39.68x smaller", True)


def test_an_empty_history_is_no_full_block(tmp_path: Path) -> None:
    async def script(d: Driver) -> None:
        await d.loaded()
        assert "█" not in "".join(panel_lines(d))
        await d.emit(SNAPSHOT)
        data = d.screen.panel.query_one(Sparkline).data
        assert data[0] == 0.0
        assert data[-1] == SNAPSHOT.used

    drive(script, tmp_path, (130, 36))


def test_what_a_step_read_is_shown_where_it_is_not_all(tmp_path: Path) -> None:
    async def script(d: Driver) -> None:
        for snapshot, shown in ((SNAPSHOT, []), (replace(SNAPSHOT, weights_read=0.62), ["62%"])):
            await d.emit(LOADED, snapshot)
            await d.pilot.pause()
            lines = [line for line in panel_lines(d) if line.startswith("weights read ")]
            assert [line.split()[-1] for line in lines] == shown

    drive(script, tmp_path, (130, 36))


def test_numbers_of_another_model_are_gone(tmp_path: Path) -> None:
    async def script(d: Driver) -> None:
        await d.emit(replace(LOADED, model="a/b"))
        await d.emit(SNAPSHOT)
        d.screen.done = Done(1, "stop", 9, 0, 77, 0.1, 0.2)
        await d.shows("31.4")
        await d.loaded()
        assert "31.4" not in d.text
        await d.type("/stats")
        assert "77 tokens" not in d.text

    drive(script, tmp_path, (130, 36))


def test_the_engine_says_how_many_tokens_stay_exact(tmp_path: Path) -> None:
    """With the real engine: sink tokens, the window, and the block that has to fill it."""

    async def script(d: Driver) -> None:
        await d.until(lambda: d.screen.snapshot is not None, 60)
        assert d.screen.snapshot.exact_until == 4 + 64 + 32
        await d.type("/set max_tokens 5")
        await d.type("Hello")
        await d.until(lambda: d.screen.snapshot.tokens > 0 and not d.screen.chat.busy, 60)
        await d.shows("all tokens still exact")
        d.screen.chat.recode("none")
        await d.until(lambda: d.screen.snapshot.exact_until == 0, 60)

    drive(script, tmp_path, make_engine=Engine)
