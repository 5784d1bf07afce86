"""Split patterns: regular expressions that cut text into words before byte-level BPE merges within each word."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from llama_jax.errors import ConfigError, brief

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Llama 3's pattern. tiktoken and `tokenizers` understand it alike."""

ONE_DIGIT_PATTERN = SPLIT_PATTERN.replace("{1,3}", "")
"""Llama 3's pattern with every digit a word of its own (Qwen 2)."""

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""GPT-2's pattern: `ByteLevel` with its own regex in `tokenizers`."""

# `Digits` asks Rust's standard library what a number is, which knows these from Unicode 17; regex engines are at 16.
_NUMBER = r"\p{N}\x{11DE0}-\x{11DE9}\x{16FF4}-\x{16FF6}"
DIGITS_PATTERN = rf"[{_NUMBER}]|'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?[^\s\p{{L}}{_NUMBER}]+|\s+(?![^\s{_NUMBER}])|\s+"
"""Every digit a word of its own, and GPT-2's pattern for the text between digits (SmolLM)."""

# The patterns below are those of llama.cpp's table of pre-tokenizers (llama-vocab.cpp), in the form that the
# tokenizer.json files of these models have. Several patterns cut one after the other.
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{suffix}"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{suffix}"
    r"|{digits}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = _CASED.replace("{suffix}", _CONTRACTION).replace("{digits}", r"\p{N}{1,3}")
_TEKKEN = _CASED.replace("{suffix}", "").replace("{digits}", r"\p{N}")
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    _CJK,
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_HANGUL_AND_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_LETTERS = (
    r"\s?["
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-"
    "\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-"
    "\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-"
    "\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
    "]+"
)
_DEEPSEEK_MARKS = r"\s?[!-/:-~" + "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_YOUTU_SCRIPTS = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    "|[\u3105-\u312f]+|" + _CJK
)
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"


class Pre(NamedTuple):
    """A pre-tokenizer of llama.cpp: the way in which it splits text into words.

    Attributes:
        splits: split patterns, applied one after the other; "digits" makes every digit a word of its own.
        gpt2: True if GPT-2's pattern is applied last.
        whole_words: True if a word that is a token is encoded as that token, whatever the merges (`ignore_merges`).
        add_bos: True if a text begins with the bos token unless the file says otherwise.
    """

    splits: tuple[str, ...]
    gpt2: bool = False
    whole_words: bool = False
    add_bos: bool = False


DIGITS = "digits"
_LLAMA3 = Pre((SPLIT_PATTERN,), whole_words=True, add_bos=True)
_GPT2 = Pre((), gpt2=True)
_SMOLLM = Pre((DIGITS,), gpt2=True)
_QWEN2 = Pre((ONE_DIGIT_PATTERN,))
_GPT4O_PRE = Pre((_GPT4O,))
_BLOOM_PRE = Pre((_BLOOM,))
_BAILING = Pre(
    (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",)
)

# The first name of each pre-tokenizer is the one to write.
PRE_TOKENIZERS: dict[str, Pre] = {
    **dict.fromkeys("llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano".split(), _LLAMA3),
    # llama.cpp takes this name for fine-tunes of Llama 3, and merges words that are tokens. The models were trained
    # with Llama 3's ids, in which a word that is a token is that token.
    "smaug-bpe": Pre((SPLIT_PATTERN,), whole_words=True),
    **dict.fromkeys("dbrx glm4 chatglm-bpe".split(), Pre((SPLIT_PATTERN,))),
    **dict.fromkeys(
        "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jina-v1-en jina-v2-code "
        "roberta-bpe mpt olmo jais exaone4 trillion granite-docling".split(),
        _GPT2,
    ),
    **dict.fromkeys("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2".split(), _SMOLLM),
    **dict.fromkeys("qwen2 stablelm2 deepseek-r1-qwen kormo f2llmv2 megrez hunyuan grok-2 solar-open".split(), _QWEN2),
    "qwen35": Pre((ONE_DIGIT_PATTERN.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"\s\p{L}", r"\s\p{L}\p{M}"),)),
    "ufakzeka": Pre((ONE_DIGIT_PATTERN.removeprefix("(?i:'s|'t|'re|'ve|'m|'ll|'d)|"),)),
    "seed-coder": Pre((ONE_DIGIT_PATTERN.replace(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}\r\n]+"),)),
    "laguna": Pre((r"[^\n]+|[\n]+", ONE_DIGIT_PATTERN)),
    "minicpm5": Pre((r"\p{N}{1,3}", SPLIT_PATTERN.replace("{1,3}", "+")), whole_words=True),
    "tekken": Pre((_TEKKEN,), whole_words=True, add_bos=True),
    **dict.fromkeys("gpt-4o llama4 kanana2 talkie minimax-m2".split(), _GPT4O_PRE),
    "youtu": Pre((_YOUTU_SCRIPTS, _GPT4O.replace("{1,3}", "")), whole_words=True),
    **dict.fromkeys("deepseek-v3 hunyuan-dense joyai-llm hy_v4".split(), Pre(_DEEPSEEK3)),
    "deepseek-llm": Pre(
        ("[\r\n]", _DEEPSEEK_LETTERS, _DEEPSEEK_MARKS, r"\s+$", _HANGUL_AND_CJK, DIGITS),
    ),
    "deepseek-coder": Pre(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HANGUL_AND_CJK, DIGITS)),
    **dict.fromkeys("bloom poro-chat gpt3-finnish".split(), _BLOOM_PRE),
    "viking": Pre((_BLOOM, r"\p{N}")),
    **dict.fromkeys("bailingmoe bailingmoe2 llada-moe".split(), _BAILING),
}
"""llama.cpp's names of byte-level pre-tokenizers (`tokenizer.ggml.pre`)."""

# What tiktoken can do in one pattern.
_ONE_PATTERN = {
    ((SPLIT_PATTERN,), False): SPLIT_PATTERN,
    ((ONE_DIGIT_PATTERN,), False): ONE_DIGIT_PATTERN,
    ((GPT2_PATTERN,), False): GPT2_PATTERN,
    ((), True): GPT2_PATTERN,
    ((DIGITS,), True): DIGITS_PATTERN,
}


def one_pattern(splits: Sequence[str], gpt2: bool) -> str | None:
    """The single pattern with which tiktoken splits text exactly as a pre-tokenizer does, or None if none is known."""
    return _ONE_PATTERN.get((tuple(splits), gpt2))


def cuts_by(pattern: str) -> tuple[tuple[str, ...], bool]:
    """The split patterns, and whether GPT-2's pattern is applied last, that split as `pattern` does in tiktoken."""
    return _CUTS.get(pattern, ((pattern,), False))


_CUTS = {pattern: cuts for cuts, pattern in _ONE_PATTERN.items()}

_MAX_LENGTH = 4_000
_MAX_REPEATS = 4  # in one alternative: the time for a word grows with this power of its length
_FORBIDDEN = re.compile(r"\\[1-9gkGK]|\(\?(?![:=!]|[im]+:)")
_TOKEN = re.compile(r"\\.|\[(?:\\.|\[:\^?\w+:\]|[^\]\\])+\]|[()|]|[*+]|\{(\d*)(?:,(\d*))?\}|.", re.DOTALL)


def check(pattern: str) -> None:
    """Refuses a pattern from a file that could take very long on some text.

    Repetitions of groups that contain repetitions, back-references, conditions and long chains of repetitions are
    refused; without them the time for a text is bounded by a small power of the length of its words.

    Raises:
        ConfigError: the pattern is too long or not of this simple kind.
    """
    if len(pattern) > _MAX_LENGTH:
        raise ConfigError(f"a pattern has {len(pattern):,} characters; at most {_MAX_LENGTH:,} are supported")
    if _FORBIDDEN.search(pattern):
        raise ConfigError(f"pattern {brief(pattern)} has a back-reference or condition, which could take very long")
    repeats = [0]  # of the alternative at each open group; a closed group leaves its largest count
    largest = [0]
    closed = 0  # repetitions within the group that was just closed
    for match in _TOKEN.finditer(pattern):
        token = match[0]
        if token == "(":
            repeats.append(0)
            largest.append(0)
        elif token == ")" and len(repeats) > 1:
            closed = max(largest.pop(), repeats.pop())
            repeats[-1] += closed
            continue
        elif token == "|":
            largest[-1] = max(largest[-1], repeats[-1])
            repeats[-1] = 0
        elif token == "?":
            continue
        elif token in "*+" or token[0] == "{":
            most = match[2] if match[2] is not None else match[1]
            if most is not None and most != "" and int(most) > 1024:
                raise ConfigError(f"pattern {brief(pattern)} repeats more than 1,024 times")
            if closed:
                raise ConfigError(f"pattern {brief(pattern)} repeats a group that repeats, which could take very long")
            repeats[-1] += 1 if most is None or most == "" or int(most) > 3 else 0
        if repeats[-1] > _MAX_REPEATS:
            raise ConfigError(f"pattern {brief(pattern)} has too many repetitions in a row, which could take very long")
        closed = 0
