"""The two tokenizers that GGUF files of language models have, as `tokenizers` objects.

- gpt2: byte-level BPE. Regexes cut text into words, and a list of merges says how the bytes of a
  word join.
- llama: SentencePiece BPE. A space is the character U+2581, the pair whose joined token has the
  highest score is merged first, and a character that is no token becomes tokens of bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SPACE = "\u2581"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"  # what may stand before a word and belongs to it
_UPPER, _LOWER = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"
_CJK = r"[\u0800-\u9fa5\uac00-\ud7ff&&\S]+"
_LETTERS = (  # of deepseek-llm: alphabets with upper and lower case
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5"
    "\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba"
    "\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
    "\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
    "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134"
    "\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee"
    "\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)


def _words(number: str, letters: str = r"\p{L}") -> str:
    """The regex of Llama 3 and those like it, which differ in how many digits make a word."""
    return (
        rf"{_SUFFIX}|{_BEFORE}[{letters}]+|{number}"
        rf"| ?[^\s{letters}\p{{N}}]+[\r\n]*|{_BLANKS}"
    )


def _cased_words(suffix: str, number: str) -> str:
    """The regex of GPT-4o and those like it: a new word begins where upper follows lower case."""
    return (
        rf"{_BEFORE}{_UPPER}*{_LOWER}+{suffix}|{_BEFORE}{_UPPER}+{_LOWER}*{suffix}|{number}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}"
    )


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is cut into words before merging.

    Attributes:
        patterns: regexes, each applied to the pieces that the one before it left.
        whole_words: a word that is a token stays whole, whatever the merges make of it.
        add_bos: a text begins with the beginning-of-sequence token unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False


_ROWS = {
    ("default",): PreTokenizer(
        (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    ),
    ("falcon",): PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    ("gpt-2", "phi-2", "olmo", "mpt", "jais", "exaone4", "gigachat", "mellum", "trillion"):
        PreTokenizer((_GPT2,)),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"):
        PreTokenizer((r"\p{N}", _GPT2)),
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"):
        PreTokenizer((_words(r"\p{N}{1,3}"),), whole_words=True, add_bos=True),
    ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"): PreTokenizer((_words(r"\p{N}{1,3}"),)),
    ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "kormo"):
        PreTokenizer((_words(r"\p{N}"),)),
    ("qwen35",): PreTokenizer((_words(r"\p{N}", r"\p{L}\p{M}"),)),
    ("tekken",): PreTokenizer((_cased_words("", r"\p{N}"),), whole_words=True, add_bos=True),
    ("gpt-4o", "llama4", "kanana2"):
        PreTokenizer((_cased_words(f"{_SUFFIX}?", r"\p{N}{1,3}"),)),
    ("deepseek-llm",): PreTokenizer((
        r"[\r\n]", rf"\s?[{_LETTERS}]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$", _CJK, r"\p{N}+",
    )),
    ("deepseek-coder",): PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
}  # fmt: skip

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    name: row for names, row in _ROWS.items() for name in names
}
"""By `tokenizer.ggml.pre`. Definitions and names are those of llama.cpp.

Ids are the same as there, which is not always the model's own tokenizer: llama.cpp takes letters
outside of ASCII for upper and lower case at once (gpt-4o, tekken).
"""


def byte_level(
    tokens: Mapping[str, int], merges: Sequence[tuple[str, str]], pre: PreTokenizer
) -> Tokenizer:
    """A byte-level BPE tokenizer.

    Args:
        tokens: token to id. Bytes are written as GPT-2 does.
        merges: pairs in the order of their rank; both and what they join to are tokens.
        pre: how text is cut into words.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    bpe = models.BPE(vocab=dict(tokens), merges=list(merges), ignore_merges=pre.whole_words)
    tokenizer = Tokenizer(bpe)
    steps: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    lacking = [byte for byte in pre_tokenizers.ByteLevel.alphabet() if byte not in tokens]
    if lacking:  # these bytes give no id. Cut here, what stands on either side does not merge.
        pattern = "|".join(re.escape(byte) for byte in sorted(lacking))
        steps.append(pre_tokenizers.Split(Regex(pattern), "removed"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece(
    tokens: Mapping[str, int], ranked: Sequence[str], space_prefix: bool
) -> Tokenizer:
    """A SentencePiece BPE tokenizer with byte fallback.

    Args:
        tokens: token to id, with all of `<0x00>` to `<0xFF>`.
        ranked: the tokens that text may merge to, the one that is merged first at the beginning.
        space_prefix: a text, and what follows a special token, begins with a space.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    merges = list(_merges(ranked))
    tokenizer = Tokenizer(models.BPE(vocab=dict(tokens), merges=merges, byte_fallback=True))
    spaces = normalizers.Replace(" ", _SPACE)
    prefixed = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
    tokenizer.normalizer = prefixed if space_prefix else spaces
    # mlx-lm takes its linear streaming detokenizer for exactly these steps.
    steps: list[decoders.Decoder] = [
        decoders.Replace(_SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if space_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges(ranked: Sequence[str]) -> Iterator[tuple[str, str]]:
    """All pairs of tokens that join to a token, in the order in which they are merged.

    What is inside a token merges the same wherever the token stands, so each is only ever made of
    one of its pairs and their order does not matter. Of different tokens with equal scores the one
    of lower id is merged first; llama.cpp takes the one further left. Trained vocabularies have no
    equal scores.
    """
    known = set(ranked)
    for token in ranked:
        for cut in range(1, len(token)):
            if token[:cut] in known and token[cut:] in known:
                yield token[:cut], token[cut:]
