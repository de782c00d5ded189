"""Nothing behind what a page leaves open is lost, rows stay rows, and time grows with length."""

from __future__ import annotations

import resource
import time

import pytest

from leankv_mlx.documents.html import is_html, page_text


def text_of(page: str) -> str:
    return page_text(page.encode(), "a.html")[0]


UNCLOSED = (
    "<head>", "<iframe src=x>", "<nav>", "<noscript>", "<object>", "<script>", "<select>",
    "<style>", "<svg>", "<template>", "<textarea>", "<title>", "<xmp>", "<plaintext>", "<noembed>",
    "<noframes>", "<!--", "<![CDATA[", "<a title='>", '<a title=">', "<math>", "<button>",
    "<div><nav>menu</div>",
)  # fmt: skip


@pytest.mark.parametrize("opened", UNCLOSED)
def test_what_is_not_closed_swallows_nothing(opened: str) -> None:
    """Kind: an element, comment or quotation mark without an end takes the rest of the page."""
    text = text_of(f"<body><p>before</p>{opened}<p>the <b>rest</b> of it</p><p>the end")
    assert "before" in text
    assert "the rest of it\n\nthe end" in text


@pytest.mark.parametrize("tag", ["nav", "iframe", "noscript", "object"])
def test_what_holds_most_of_a_page_is_the_page(tag: str) -> None:
    text = "This is all that the page has to say. " * 9
    assert text.strip() in text_of(f"<p>Title</p><{tag}><p>{text}</{tag}>")
    assert text.strip() in text_of(f"<{tag}>Menu<p>{text}<{tag}>more</{tag}>")
    assert text_of(f"<{tag}>Menu</{tag}><p>{text}") == text.strip()


def test_much_that_is_left_out_is_said() -> None:
    menu, text = "menu entry " * 300, "text of the page " * 300
    found, note = page_text(f"<nav>{menu}</nav><p>{text}".encode(), "a.html")
    assert found == text.strip()
    assert note == "3,299 characters of menus and the like were left out of a.html."


def test_a_title_without_an_end_is_no_page() -> None:
    page = "<title>T<p>" + "text " * 300 + "<svg><title>x</title></svg>"
    assert text_of(page).endswith("text")
    assert text_of("<title>Put it in a <form> tag</title><p>x") == "Put it in a <form> tag\n\nx"


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<p>1 < 2 and a<b", "1 < 2 and a"),  # a page cut in the middle of a tag
        ("a <- b << c </ d> <> e", "a <- b << c <> e"),
        ("<p>x<a href='a>b' title=\"c>d\">y</a>", "xy"),
        ("<!-->a<!--->b<!-- c --!>d<!-- <p>no</p> -->e", "abde"),
        ("<script src=a /><p>b<iframe/>c<script>no</script>", "bc"),
        ("<![CDATA[a <b> c]]>", "a <b> c"),
        (
            "&lt;p&gt; &#8364; &#x20ac; &amp;amp; &copy &#" + "9" * 5000 + ";",
            "<p> € € &amp; © \ufffd",
        ),
        ("<ul><li><p>a</p></li><li><p>b</p></li></ul>", "- a\n\n- b"),
        ("<h1></h1><p>a<li></li>", "a"),
        ("<select><option>a<option>b</select>", "a\nb"),
    ],
)
def test_markup_as_it_comes(page: str, text: str) -> None:
    assert text_of(page) == text


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<tr><th><p>x</p></th><th><p>y</p></th></tr><tr><td><p>1<td><p>2", "x | y\n1 | 2"),
        ("<tr><td><div>a<br>b</div></td><td>c</td></tr>", "a b | c"),
        ("<tr><td><ul><li>a<li>b</ul></td><td>c</td></tr>", "- a - b | c"),
        ("<tr><td></td><td>x</td></tr><tr><td>a<td><td>b", "| x\na |  | b"),
        ("<tr><td><p>one<p>two</td></tr>", "one\n\ntwo"),
        ("<tr><td><h1>A</h1><p>b</td><td><p>c</td></tr>", "# A\n\nb\n\nc"),
        ("<tr><td><pre>1\n2</pre><td><pre>a\n b</pre>", "1\n2\n\na\n b"),
        ("<tr><td>x<td><table><tr><td>a<td>b</table>y", "x\n\na | b\n\ny"),
        (f"<tr><td>x<td><p>{'long ' * 250}<p>y", f"x\n\n{('long ' * 250).strip()}\n\ny"),
    ],
)
def test_cells_keep_their_rows(page: str, text: str) -> None:
    """Kind: an element inside a cell breaks the line of its row."""
    assert text_of(f"<table>{page}</table>") == text
    assert text_of(f"<p>before<table>{page}</table><p>after") == f"before\n\n{text}\n\nafter"


HOSTILE = (
    "<a ", "<a b='", '<a b="', "<!--", "<?", "<!", "</", "<![CDATA[", "<", "&", "&#9", "<title>",
    "<script>", "<textarea>", "<a =", "= ", "<a b=\"<c d='", "<div>", "<span>", "<nav>x",
    "<p><b id=1>x", "<table><tr><td>x", "<table>x", "<ul><li>", "</div>", "<a><div>", "<pre>\n",
    "<svg><title>", "-->", "<p \n", "<template>",
)  # fmt: skip


@pytest.mark.parametrize("part", HOSTILE)
@pytest.mark.parametrize("before", ["", "<a ", "<!--", "<title>", "<table><tr><td>"])
def test_time_grows_with_length_alone(part: str, before: str) -> None:
    """Kind: a small page that repeats what is open takes minutes (quadratic parsing)."""
    start = time.process_time()
    page_text((before + part * (60_000 // len(part))).encode(), "a.html")
    assert time.process_time() - start < 4  # it was 53 s and more


def test_deep_pages_need_no_stack() -> None:
    assert text_of("<div>" * 100_000 + "deep" + "</div>" * 100_000 + "<p>after") == "deep\n\nafter"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text_of("<p><b id=1>" * 100_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_what_begins_as_a_page_does() -> None:
    for page in (
        "<html>",
        "\n<!DOCTYPE html>",
        "<!-- a - b -->\n<?xml version='1'?><html lang=en>",
    ):
        assert is_html(page.encode())
        assert is_html(page.encode("utf-16"))
    for text in ("", "<p>", "# <html>", "<!-- a", "<!-- markdown -->\n# x"):
        assert not is_html(text.encode())
