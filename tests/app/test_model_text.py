"""Text of a model is never HTML, and text from outside is never markup: every word of it arrives.

The kind of fault: a reader of some notation (HTML, Markdown, Textual's markup) takes a piece of
plain text for its own, and the piece is gone from the screen.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.app.harness import LOADED, Driver, drive, places  # isort: skip

from markdown_it.token import Token
from textual.widgets import Static

from leankv_app.markdown import parser
from leankv_app.options import Options
from leankv_app.store import Message, Store
from leankv_app.widgets.segment import Segment

REPLIES = [
    "A List<String> of Map<K, V> and std::vector<std::string>.",
    "Put it in a <form> tag, then a <br> and </form>.",
    "<think>\nWhat is asked?\n</think>\nThe answer.",
    "<!-- a comment --> and <![CDATA[ data ]]> and <?php echo 1; ?>",
    "<div>\nin a block\n</div>",
    "It is written &lt;b&gt; and &amp;nbsp; and &#65;.",
    "[note]: http://a.example 'a definition'",
    "[the docs](javascript:alert) and [here](http://b.example/page) ![a picture](c.png)",
    "<http://d.example> and <e@f.example> and http://g.example/%41",
    "[bold]not markup[/] [@click=app.quit]leave[/]",
]
TABLE = "| name | is |\n|---|---|\n| one | more | cells | than |\n| a\\|b | c |"


def test_a_reply_is_never_html(tmp_path: Path) -> None:
    """Streamed, complete, after a resume and in copies and exports; the exact text."""

    async def script(d: Driver) -> None:
        copied: list[str] = []
        d.app.copy_to_clipboard = copied.append
        await d.loaded()
        for reply in REPLIES:
            await d.type("hello")
            for start in range(0, len(reply), 7):
                d.engine.say(reply[start : start + 7], done=False)
                await d.pilot.pause(0.05)
            await d.shows(" ".join(reply.split()))
            d.engine.say("\n\nThe end.")
            await d.until(lambda: not d.screen.chat.busy)
            await d.shows(" ".join(reply.split()))
            await d.type("/copy")
            assert copied.pop() == f"{reply}\n\nThe end."
        await d.type(f"/export {tmp_path}/chat.md")
        exported = (tmp_path / "chat.md").read_text()
        assert [reply for reply in REPLIES if reply not in exported] == []

    async def later(d: Driver) -> None:
        for reply in REPLIES:
            await d.shows(" ".join(reply.split()))

    drive(script, tmp_path, (99, 40))
    drive(later, tmp_path, (99, 120), Options(resume="last"))


def test_a_reply_keeps_what_markdown_drops(tmp_path: Path) -> None:
    """Cells beyond a table's head, text behind a fence, and what is nested very deep."""
    deep = "> " * 30 + "deep in quotes\n\n" + "- " * 30 + "deep in lists"
    code = "``` this is text, not a language\ncode\n```"

    async def script(d: Driver) -> None:
        await d.loaded()
        await d.said("hello", f"{TABLE}\n\n{deep}\n\n{code}")
        for text in ("more | cells | than", "a|b", "deep in quotes", "deep in lists",
                     "this is text, not a language"):  # fmt: skip
            await d.shows(text)

    drive(script, tmp_path, (99, 60))


PIECES = (
    "{}", "{}", "List<{}>", "<{}>", "</{}>", "<{} {}='{}'>", "<!-- {} -->", "<!-- {}", "&{};",
    "[{}]: {}", "[{}]: <{}> '{}'", "[{}](javascript:{})", "[{}](http://{}.example '{}')",
    "[{}][{}]", "![{}]({}.png)", "<http://{}.example>", "<{}@{}.example>",
    "http://{}.example/{}?{}&{}",
    "{}::<std::{}>", "`{}<{}>`", "**{}**", "*{}", "_{}_", "~~{}~~",
    "\n| {} | {} |\n|--|--|\n| {} |{}|{}|",
    "\n# {}", "\n- {}", "\n    {}", "\n> {}", "\n1. {}", "\n``` {} {}", "\n~~~\n", "\n```\n",
    "<br>", "<think>", "</think>", "<style>{}</style>", "<script>{}", "<![CDATA[{}]]>", "<?{}?>",
    "<!DOCTYPE {}>", "{}[^{}]", "\n[^{}]: {}", "\\<{}>", "[bold]{}[/]", "[{}", "\n---", "\n===",
    "\n\n", "\n<div>{}\n\n{}</div>",
)  # fmt: skip


def made(rng: random.Random) -> tuple[str, list[str]]:
    """A text with tags, and the words that have to be visible."""
    seen: list[str] = []
    text = ""
    for piece in rng.choices(PIECES, k=rng.randint(1, 12)):
        new = [f"w{len(seen) + i}x" for i in range(piece.count("{}"))]
        seen += new
        text += piece.format(*new) + rng.choice((" ", " ", "\n"))
    return text, seen


def plain(tokens: Sequence[Token]) -> str:
    """What a widget shows of tokens: texts and code."""
    return " ".join(
        plain(token.children) if token.children is not None else token.content for token in tokens
    )


def test_every_word_of_a_reply_is_read_as_text() -> None:
    """Property, over 3,000 random texts."""
    for seed in range(3000):
        text, seen = made(random.Random(seed))
        found = plain(parser().parse(text))
        assert not [word for word in seen if word not in found], (seed, text, found)


@pytest.mark.parametrize("count", [10, pytest.param(25, marks=pytest.mark.slow)])
def test_every_word_of_a_reply_is_visible(count: int, tmp_path: Path) -> None:
    """Property: random texts in the real widgets, each shown whole and piece by piece."""

    async def script(d: Driver) -> None:
        area = d.screen.conversation.messages
        for seed in range(count):
            text, seen = made(random.Random(seed))
            await area.remove_children()
            whole, grown = Segment(text), Segment("", live=True)
            await area.mount(Static("WHOLE"), whole, Static("GROWN"), grown)
            for start in range(0, len(text), 20):
                await grown.markdown.append(text[start : start + 20])
            await d.pilot.pause()
            _, first, second = d.text.replace("GROWN", "WHOLE").split("WHOLE")
            missing = [word for word in seen if word not in first or word not in second]
            assert not missing, (seed, text, d.text)

    drive(script, tmp_path, (400, 250))


def test_one_parser_serves_all_replies() -> None:
    assert parser() is parser()


def test_names_and_titles_are_never_markup(tmp_path: Path) -> None:
    """Textual's markup in titles, names of files, notes, toasts and dialogs is shown as it is."""
    tag = "[b]x[/] [/nosuch]"
    path = tmp_path / "[red]a[b] <b>.txt"
    path.write_text("text")
    store = Store(places(tmp_path).database)
    store.add(store.create("", "leankv", ""), Message("user", f"{tag} <form>"))
    store.close()

    async def script(d: Driver) -> None:
        await d.emit(LOADED)
        d.app.notify(f"toast {tag}", title=f"title {tag}")
        d.screen.notify(f"from a screen {tag}")
        await d.shows(f"toast {tag}")
        await d.shows(f"title {tag}")
        await d.shows(f"from a screen {tag}")
        d.app.clear_notifications()
        await d.type(f"/file {path}")
        await d.shows("[red]a[b] <b>.txt: 4 characters")
        await d.type(f"/file {path}x")
        await d.shows("[red]a[b] <b>.txtx")
        d.screen.say_error(f"about {tag}", f"text {tag}")
        await d.shows(f"about {tag}")
        await d.shows(f"text {tag}")
        await d.pilot.press("escape")
        await d.pilot.press("ctrl+s")
        await d.shows(f"{tag} <form>")
        await d.pilot.press("r")
        await d.shows(f"{tag} <form>")
        await d.pilot.press("escape", "d")
        await d.shows(f"{tag} <form>")
        await d.pilot.press("escape", "enter")
        await d.shows(f"leankv-chat · {tag} <form>")
        d.app.save_picture()
        await d.shows("written to")

    drive(script, tmp_path, (200, 40))
