"""What the LLM thought of each of the SLM's drafts, from recordings of both: the probability y_d, and whether the draft
is what the LLM says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.engine.base import Tokenizer
from tools.eval.led import Followed, Written


@dataclass(frozen=True, slots=True)
class Opinion:
    """Of m steps: `y` (m,): y_d; `agrees` (m,); `said`: which of the LLM's own tokens answer each, the first of them
    whole even where the step begins inside it."""

    y: NDArray[np.float32]
    agrees: NDArray[np.bool_]
    said: list[range]


def opinion(slm: Tokenizer, llm: Tokenizer, answer: Written, steps: Followed) -> Opinion:
    """y_d comes from the likeliest tokens that were recorded alone: what is none of them counts as 0.

    Two tokenizers: by bytes, as the cloud decides (server/cloud/text.py), along the LLM's own tokens. y_d is the mass
    of all tokens whose bytes equal or extend the draft's, and where the LLM's token is only the beginning of the
    draft, that token's probability times the rest's is added. Of a step inside an LLM token the LLM has decided
    already: y_d is 1 if what is left of the token begins with the draft, the probability of what goes beyond if it is
    the other way round, else 0. (The product would tokenise the half token anew.) Beyond the end of an answer that
    was cut the draft gets the benefit of the doubt.
    """
    if slm.fingerprint == llm.fingerprint:
        return _by_token(slm, answer, steps)
    return _by_bytes(slm, llm, answer, steps)


def _by_token(tokenizer: Tokenizer, answer: Written, steps: Followed) -> Opinion:
    eog = list(tokenizer.eog)
    draft, said = steps.top_ids[:, 0], answer.ids
    ends = np.isin(draft, eog)  # one token that ends the answer is as good as another
    same = (answer.top_ids == draft[:, None]) | (np.isin(answer.top_ids, eog) & ends[:, None])
    agrees = (draft == said) | (ends & np.isin(said, eog))
    y = np.minimum(1.0, (answer.top_y * same).sum(axis=1)).astype(np.float32)
    return Opinion(y, agrees, [range(row, row + 1) for row in range(len(draft))])


def _by_bytes(slm: Tokenizer, llm: Tokenizer, answer: Written, steps: Followed) -> Opinion:
    speech = _Speech(llm, answer)
    found: list[tuple[float, bool, range]] = []
    for token, at in zip(steps.top_ids[:, 0].tolist(), steps.begins.tolist(), strict=True):
        draft = slm.piece(token)
        if draft or token in slm.eog:
            found.append((speech.probability(at, draft), speech.agrees(at, draft), speech.answer(at, draft)))
        else:  # a control token is neither text nor an end
            found.append((0.0, False, speech.answer(at, draft)))
    y, agrees, said = zip(*found, strict=True)
    return Opinion(np.array(y, np.float32), np.array(agrees), list(said))


class _Speech:
    """The LLM's answer as bytes. A draft is bytes, too; b"": the end."""

    def __init__(self, llm: Tokenizer, answer: Written) -> None:
        self._pieces = [llm.piece(token) for token in answer.ids.tolist()]
        self._ends = np.cumsum([len(piece) for piece in self._pieces])
        self._text = b"".join(self._pieces)
        self._cut = int(answer.ids[-1]) not in llm.eog
        self._y = answer.top_y
        likely = [[(token, llm.piece(token)) for token in row] for row in answer.top_ids.tolist()]
        self._likely = [[None if token in llm.eog else piece for token, piece in row] for row in likely]

    def agrees(self, at: int, draft: bytes) -> bool:
        rest = self._text[at:]
        if not rest:
            return not draft and not self._cut
        return bool(draft) and (rest.startswith(draft) or (self._cut and draft.startswith(rest)))

    def probability(self, at: int, draft: bytes) -> float:
        row, rest = self._token(at)
        if rest == self._pieces[row]:
            return min(1.0, self._mass(row, draft))
        if draft and rest.startswith(draft):
            return 1.0
        return min(1.0, self._mass(row + 1, draft[len(rest) :])) if draft.startswith(rest) else 0.0

    def answer(self, at: int, draft: bytes) -> range:
        """As many of the LLM's tokens as it takes to decide about the draft."""
        row, said = self._token(at)
        end = row + 1
        while end < len(self._pieces) and len(said) < len(draft) and draft.startswith(said):
            said += self._pieces[end]
            end += 1
        return range(row, end)

    def _token(self, at: int) -> tuple[int, bytes]:
        """Which token the byte at `at` is in, and the token's bytes from there on; at the end, the last token."""
        row = min(int(np.searchsorted(self._ends, at, side="right")), len(self._pieces) - 1)
        return row, self._pieces[row][at - int(self._ends[row]) + len(self._pieces[row]) :]

    def _mass(self, row: int, draft: bytes) -> float:
        if row == len(self._pieces):
            return 1.0
        fits = [piece is None if not draft else bool(piece and piece.startswith(draft)) for piece in self._likely[row]]
        mass = float(self._y[row][fits].sum())
        piece = self._pieces[row]
        if piece and len(piece) < len(draft) and draft.startswith(piece):
            mass += float(self._y[row][0]) * self._mass(row + 1, draft[len(piece) :])
        return mass
