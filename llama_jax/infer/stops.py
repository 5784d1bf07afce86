"""Stop strings: texts that end a continuation, even if they begin in one token and end in another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_jax.text.tokenizer import Tokenizer


class StopScanner:
    """Searches a growing text for stop strings, and releases only text that cannot be part of one."""

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str]):
        """Makes a scanner for one continuation.

        Args:
            tokenizer: tokenizer of the tokens that will come.
            stops: the stop strings, none of them empty.
        """
        from llama_jax.text.tokenizer import StreamDecoder

        if tokenizer is None:
            raise ValueError("stop strings need a tokenizer: give one, or use stop_tokens")
        self._decoder = StreamDecoder(tokenizer, continues=True)
        self._known = tokenizer.vocab_size
        self._stops = tuple(stops)
        self._held = ""  # text that has not been released

    def push(self, tokens: Sequence[int], *, end: bool) -> tuple[int, str, str | None]:
        """Reads new tokens.

        Args:
            tokens: the new ids.
            end: True if no more tokens come, so that nothing is held back.

        Returns:
            The number of tokens up to the end of a stop string (all of them if there is none), the text that is
            released, and the stop string, or None.
        """
        for i, token in enumerate(tokens):
            self._held += self._decoder.push([token] if token < self._known else [])
            if i + 1 == len(tokens) and end:
                self._held += self._decoder.flush()
            found = [(self._held.find(stop), stop) for stop in self._stops if stop in self._held]
            if found:
                place, stop = min(found, key=lambda pair: (pair[0], -len(pair[1])))
                text, self._held = self._held[:place], ""
                return i + 1, text, stop
        keep = 0 if end else self._open()
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return len(tokens), text, None

    def _open(self) -> int:
        """Length of the longest suffix of the held text that is a proper prefix of a stop string."""
        longest = min(max(map(len, self._stops)) - 1, len(self._held))
        for length in range(longest, 0, -1):
            tail = self._held[len(self._held) - length :]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
