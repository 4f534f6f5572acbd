"""Tokens to text as it streams: whole UTF-8 characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from agent.privacy.redact import Redaction, Restoring


class TextStream:
    """Feed it pieces of bytes; it gives back what may be shown already. `restoring`: puts back what stands behind
    placeholders; stop strings are those of the restored text."""

    def __init__(self, stop: Sequence[str] = (), restoring: Restoring | None = None) -> None:
        self._restoring = restoring or Restoring(Redaction())
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = [text for text in stop if text]
        self._held = ""
        self.stopped = False

    def push(self, piece: bytes, *, final: bool = False) -> str:
        """The text that `piece` settles. `final`: nothing follows, so give out all that was held back."""
        if self.stopped:
            return ""
        self._held += self._restoring.push(self._decoder.decode(piece, final), final=final)
        # The first one to be complete wins, so that it does not matter how the text was cut into pieces.
        found = [(at + len(text), at) for text in self._stop if (at := self._held.find(text)) >= 0]
        if found:
            self.stopped = True
            cut = min(found)[1]
            shown, self._held = self._held[:cut], ""
            return shown
        keep = 0 if final else self._partial_stop()
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def _partial_stop(self) -> int:
        """Length of the longest end of the held text that may still become a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(text.startswith(self._held[-length:]) for text in self._stop):
                return length
        return 0
