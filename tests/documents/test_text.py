"""Encodings: what is named is read as browsers read it, and one bad byte costs one character."""

from __future__ import annotations

from pathlib import Path

import pytest

from leankv_mlx.documents.readers import read_document
from leankv_mlx.documents.text import codec_of
from leankv_mlx.errors import DocumentError, UsageError

GERMAN = "Die Größe der Brücke über den Fluß wurde geprüft. "


def page(label: str, content: bytes) -> bytes:
    return b"<!doctype html><html><meta charset='%s'><p>%s</p>" % (label.encode(), content)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (f"{GERMAN}X{GERMAN}".encode().replace(b"X", b"\xff"), f"{GERMAN}\ufffd{GERMAN}"),
        (f"{GERMAN}naïve".encode().replace("ï".encode(), b"\xc3"), f"{GERMAN}na\ufffdve"),
        (f"{GERMAN}“".encode()[:-1], f"{GERMAN}\ufffd"),
        ("plain text ”".encode()[:-1], "plain text \ufffd"),
        ("灯台の守り人".encode()[:-1], "灯台の守り\ufffd"),
        (GERMAN.encode("utf-8-sig") + b"\xff.", f"{GERMAN}\ufffd."),
        (GERMAN.encode("utf-16") + b"x", f"{GERMAN}\ufffd"),
    ],
)
def test_one_bad_byte_is_one_character_and_a_note(raw: bytes, text: str, tmp_path: Path) -> None:
    """Kind: a text that is damaged in one place is turned into another or refused."""
    for name, content in (("a.txt", raw), ("a.html", raw)):
        (tmp_path / name).write_bytes(content)
        found = read_document(tmp_path / name)
        assert found.text == text.strip()
        assert found.notes == (f"1 character of {name} could not be decoded and became \ufffd.",)


def test_a_given_encoding_forgives_one_bad_byte_too(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(GERMAN.encode() + b"\xff")
    assert read_document(path, "utf-8").text == f"{GERMAN}\ufffd"
    path.write_bytes("灯台守".encode("shift_jis") + b"\x81")
    assert read_document(path, "shift_jis").text == "灯台守\ufffd"
    path.write_bytes(b"\xfe\xff" + GERMAN.encode("utf-16-be"))
    assert read_document(path, "utf-16").text == GERMAN.strip()
    path.write_bytes("灯台守".encode("shift_jis"))
    with pytest.raises(DocumentError, match="is not utf-8"):
        read_document(path, "utf-8")


@pytest.mark.parametrize(
    ("label", "codec", "text"),
    [
        ("gb2312", "gbk", "朱镕基"),
        ("GBK", "gb18030", "镕㐀"),
        ("shift_jis", "cp932", "第①章 \uff5e"),
        ("x-sjis", "cp932", "①"),
        ("euc-jp", "euc_jis_2004", "第①章"),
        ("iso-8859-1", "cp1252", "“quoted” €"),
        ("latin1", "cp1252", "“it”"),
        ("ascii", "cp1252", "café"),
        ("euc-kr", "cp949", "똠방각하"),
        ("big5", "big5hkscs", "中文"),
        ("windows-1251", "cp1251", "Привет"),
        ("utf8", "utf-8", "naïve"),
    ],
)
def test_labels_mean_what_they_mean_to_browsers(
    label: str, codec: str, text: str, tmp_path: Path
) -> None:
    """Kind: a name of an encoding that Python takes in a narrower sense than those who write it."""
    (tmp_path / "a.html").write_bytes(page(label, text.encode(codec)))
    found = read_document(tmp_path / "a.html")
    assert (found.text, found.notes) == (text, ())
    (tmp_path / "a.txt").write_bytes(text.encode(codec))
    assert read_document(tmp_path / "a.txt", label).text == text


@pytest.mark.parametrize(
    "label",
    ["None", "utf8mb4", "zlib", "punycode", "idna", "rot13", "unicode_escape", "hex", "undefined"],
)
def test_names_of_no_encoding_count_for_nothing(label: str, tmp_path: Path) -> None:
    """Kind: a word behind `charset=` that is no encoding, or a codec that is none of text."""
    path = tmp_path / "a.html"
    path.write_bytes(page(label, "naïve \\u0041 abc-".encode()))
    found = read_document(path)
    assert (found.text, found.notes) == ("naïve \\u0041 abc-", ())
    path.write_bytes(page(label, "naïve".encode("cp1252")))
    found = read_document(path)
    assert found.text == "naïve"
    assert f"there is no encoding '{label}'" in found.notes[0]
    with pytest.raises(UsageError, match=f"no encoding {label}"):
        read_document(path, label)


def test_what_a_page_says_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    for said, codec in (
        ("utf-16", "utf-8"),  # it could not say so
        ("iso-8859-1", "utf-8"),  # what servers say of everything
        ("shift_jis", "utf-8"),
        ("utf-8", "cp1252"),
        ("utf-8,text/html", "utf-8"),
    ):
        path.write_bytes(page(said, GERMAN.encode(codec)))
        assert read_document(path).text == GERMAN.strip(), said
    path.write_bytes(b'<?xml version="1.0" encoding="koi8-r"?><!doctype html><p>' + b"\xd4\xc5")
    assert read_document(path).text == "те"


def test_labels_of_any_shape() -> None:
    for label in ("", "\0", "\udc80", "x" * 10000, "../os", "utf-8\n"):
        assert codec_of(label) in ("", "utf-8")
    assert codec_of("cp437") == "cp437"
    assert codec_of("utf-32") == "utf-32"
