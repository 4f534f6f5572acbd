from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.adapters import (
    AdapterAgreed,
    AdapterCall,
    AdapterGroup,
    AdapterOffer,
    Blob,
    centre_of,
    decode_agreed,
    decode_call,
    decode_offer,
    encode,
    fitting,
    nearest,
)
from protocol.errors import ProtocolError

URL = "http://10.0.0.1:8450/v1/adapters"
MODEL, ID = "ab" * 32, "cd" * 32


def group(centre: list[float] | None = None, devices: int = 1, ranks: tuple[int, ...] = (8,)) -> AdapterGroup:
    return AdapterGroup(
        MODEL,
        {rank: Blob(ID, rank) for rank in ranks},
        devices,
        1,
        centre=centre_of(floats(centre) if centre else None),
    )


def floats(values: list[float]) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.array(values, np.float32)


class TestMessages:
    call = AdapterCall(3, 60.0, URL, "flexlora", 1000, 5.0)
    offer = AdapterOffer(3, 2, MODEL, ID, 1000, 8, 64, noise=2.0, clip=1.0)
    agreed = AdapterAgreed(4, 3, URL, [group([1.0, -0.5], 3, (4, 8))])

    def test_they_come_back_as_they_were(self) -> None:
        assert decode_call(encode(self.call)) == self.call
        assert decode_offer(encode(self.offer)) == self.offer
        assert decode_agreed(encode(self.agreed)) == self.agreed

    def test_a_newer_version_is_none_and_an_unknown_field_is_ignored(self) -> None:
        told = msgspec.json.decode(encode(self.offer))
        assert decode_offer(msgspec.json.encode({**told, "version": 2, "bytes": "many"})) is None
        assert decode_offer(msgspec.json.encode({**told, "later": 1})) == self.offer

    @pytest.mark.parametrize(
        "values",
        [
            {"id": "../../etc/passwd"},
            {"id": ID + "\n"},
            {"id": ID.upper()},
            {"bytes": 0},
            {"bytes": 1 << 40},
            {"rank": 0},
            {"lessons": 10**7},
            {"share": "b"},
            {"round": -1},
        ],
    )
    def test_what_makes_no_sense_is_refused(self, values: dict[str, object]) -> None:
        told = msgspec.json.decode(encode(self.offer))
        with pytest.raises(ProtocolError):
            decode_offer(msgspec.json.encode({**told, **values}))

    @pytest.mark.parametrize("url", ["file:///etc/passwd", "http://user:secret@host/", "http://host/?q", "ftp://host"])
    def test_only_urls_of_http_are_followed(self, url: str) -> None:
        told = msgspec.json.decode(encode(self.call))
        with pytest.raises(ProtocolError):
            decode_call(msgspec.json.encode({**told, "url": url}))

    @given(st.binary(max_size=300))
    def test_noise_is_malformed(self, raw: bytes) -> None:
        for decode in (decode_call, decode_offer, decode_agreed):
            with pytest.raises(ProtocolError):
                decode(raw)

    def test_the_largest_agreed_fits(self) -> None:
        """Sixteen groups of a model with 4,096 dimensions, eight ranks each."""
        of_all = [group([1.0] * 4096, ranks=(1, 2, 4, 8, 16, 32, 64, 128))] * 16
        assert decode_agreed(encode(AdapterAgreed(1, 1, URL, of_all))) is not None


class TestNearest:
    def test_is_the_group_with_the_most_similar_centre(self) -> None:
        groups = [group([1.0, 0.0], 9), group([0.1, 1.0])]
        assert nearest(centre_of(floats([0.0, 3.0])), groups) is groups[1]
        assert nearest(centre_of(floats([3.0, 1.0])), groups) is groups[0]

    def test_is_the_largest_where_nothing_is_known(self) -> None:
        groups = [group(None, 2), group([1.0, 0.0], 3)]
        assert nearest(b"", groups) is groups[1]
        assert nearest(centre_of(floats([-1.0, 0.0])), groups) is groups[1]
        assert nearest(b"", []) is None

    @given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=64))
    def test_a_centre_keeps_its_direction(self, values: list[float]) -> None:
        told = centre_of(floats(values))
        if max(map(abs, values)) > 1e-3:
            back = np.frombuffer(told, np.int8).astype(np.float64)
            own = np.array(values)
            assert back @ own / (np.linalg.norm(back) * np.linalg.norm(own)) > 0.99


def test_the_rank_is_the_own_one_or_the_next_lower() -> None:
    of = group(ranks=(4, 8, 16))
    assert [fitting(of, rank).bytes for rank in (2, 4, 7, 8, 64)] == [4, 4, 4, 8, 16]
