"""Split patterns: regular expressions that cut text into words before byte-level BPE merges within each word."""

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
