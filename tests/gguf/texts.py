"""Texts that tokenizers stumble over."""

from collections.abc import Iterator

_LINES = (
    "👩‍👩‍👧‍👦👨🏽‍🚀🏳️‍🌈🏴‍☠️🇩🇪🇯🇵🇧🇷 🤷🏿‍♀️ ☎️ 1️⃣ ❤️‍🔥\n",
    "你好，世界！这是一个测试。「こんにちは」カタカナ ｱｲｳ 한국어 텍스트입니다 龘靐齉\n",  # noqa: RUF001
    'def f(x: int) -> dict[str, Any]:\r\n\treturn {\'a\': x ** 2, "b": f"{x!r:>10}"}\r\n\r\n\r\n',
    "# c'est l'ete, I'LL DON'T we've\nif (a&&b||!c) { x+=1; y<<=2; /* ** */ } else\n",
    '<div class="a">&nbsp;</div><table><tr><td></td></tr></table></s><s>\n',
    "\t\t\tx\t \t y\n\n\n\n\n   \n \n  z     w" + " " * 40 + "end" + "\n" * 40 + " \t" * 10,
    "\r\r\n\n\r\u00a0\u2003\u3000 \u2028\u2029\u0085\x0b\x0c.\n",
    "e\u0301a\u0308o\u0302\u0323 n\u0303 \ufb01 \u212b \u00c5 \u2126 \u212a \u017f '\u017f 'S\n",
    "\u01c6 \u01c5 \u0130i \u1e9e\u00df\n",
    "".join(map(chr, range(1, 32))) + "!\x04!\x7f\x80\x9f a\x13b \x16\x16\n",
    "0123456789 " * 3 + "3.14159265358979323846 1,000,000 ²³¹½⅓ \u0661\u0662\u0663 १२३ Ⅳ 一二三\n",
    "~~ ~a a~b `x` ^^ $5 €5 £ ¢ ©®™ §¶ ±\u00d7÷ ≠≤∞ \u2211∫ ←→⇒ ░▒▓█ ─│┌┐ ◆●★ ♠♥ ♪\n",
    "שָׁלוֹם עולם مَرْحَبًا بالعالم नमस्ते दुनिया สวัสดีชาวโลก Привет, МирТест\n",
    "\u0393\u03b5\u03b9\u03ac\u03a3\u03bf\u03c5 Ünïcödé helloWorld XMLHttpRequest ÉcoleÀ\n",
    "zero\u200bwidth\u200d\u200c\u2060\ufeff\u00ad \ue000\U000f0000\U00020000\U0003134a\ufffd\n",
    "<0x0A> <0x> ▁ ▁▁ _▁ ▁a <unused5> <bos>x<eos> <|im_start|>user\nhi<|im_end|> <|endoftext|>\n",
    "<tool_call>{}</tool_call> <mask>[multimodal] <start_of_turn> <pad><unk> <|im_ <|fim_pad|>\n",
    "a" * 17
    + " "
    + "ha" * 7
    + " ====================== ------------- ########### ......... ,,,,\n",
    '!!!!!! ????? ((((((( ))))) \\\\\\\\ ////// xxxxxxxxx 000000000 """"" \'\'\'\' ______ *****\n',
)


def tricky_text() -> str:
    """Emoji, CJK, code, line ends, white space, marks, controls, digits, and pieces of them mixed.

    About 25,000 characters, the same on every machine.
    """
    whole = "".join(_LINES)
    draw = _draws()
    pieces = []
    for _ in range(2000):
        start = next(draw) % len(whole)
        pieces.append(whole[start : start + 1 + next(draw) % 12])
    for _ in range(6000):
        block = (0x250, 0x3000, 0x10000, 0x110000)[next(draw) % 4]
        point = 1 + next(draw) % (block - 1)
        if not 0xD800 <= point < 0xE000:
            pieces.append(chr(point))
        if next(draw) % 5 == 0:
            pieces.append(" \n'"[next(draw) % 3])
    return whole + "".join(pieces)


def _draws() -> Iterator[int]:
    """Numbers that no release of Python changes."""
    state = 1
    while True:
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        yield state >> 33
