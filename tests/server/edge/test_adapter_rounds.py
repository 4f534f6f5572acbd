"""Rounds of adapters, from the devices' files to the files that they get back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from agent.adapt.noise import frozen_start
from models.adapter import MOST_RANK, Adapter, Factors, read, write
from protocol.adapters import AdapterCall, decode_call, encode
from protocol.errors import ConfigError
from protocol.topics import ADAPTER_CALL, EDGE
from server.edge.adapter_combine import ChildCombiner, CombineFailed, Job, Result, Upload
from server.edge.config import AdaptersSection, EdgeConfig, Place, assemble
from server.edge.overview import noisy_releases
from tests.agent.peers.devices import eventually
from tests.server.edge.adapter_fleet import HOME, MODEL, SHARE, Device, Fleet, adapter, delta, offer_of
from tools.commands.edge import edge
from tools.edge_adapters import adapters_text


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with Fleet(tmp_path) as made:
        yield made


def three(fleet: Fleet, **options: object) -> list[Device]:
    """Who have had their agreed adapters."""
    fleet.edge(devices=3, **options)
    devices = [fleet.device(f"d{seed}", adapter(seed)) for seed in (1, 2, 3)]
    eventually(lambda: all(device.federation.past.number > 0 for device in devices))
    return devices


def test_what_three_devices_learned_comes_back_as_one(fleet: Fleet) -> None:
    devices = three(fleet, ranks=(12,))
    [kept] = fleet.look().groups
    assert (kept.group.devices, kept.group.lessons, sorted(kept.group.blobs)) == (3, 30, [4, 12])
    exact = read(fleet.folder / "adapters" / "blobs" / f"{kept.group.blobs[12].id}.gguf")
    mean = sum(delta(adapter(seed)) for seed in (1, 2, 3)) / np.float32(3)
    assert np.linalg.norm(delta(exact) - mean) < 0.01 * np.linalg.norm(mean)
    for device in devices:
        [(path, slot)] = device.considered
        assert slot == "fleet.0"
        assert path.stem == kept.group.blobs[4].id == hashlib.sha256(path.read_bytes()).hexdigest()
        assert (device.federation.past.answered, device.federation.past.number) == (1, 1)


def test_each_device_gets_its_rank(fleet: Fleet) -> None:
    fleet.edge(devices=3)
    devices = [fleet.device(f"d{rank}", adapter(rank, rank)) for rank in (2, 4, 8)]
    eventually(lambda: all(device.considered for device in devices))
    assert [read(device.considered[0][0]).rank for device in devices] == [2, 4, 8]


def test_one_that_has_learned_nothing_gets_what_the_others_agreed(fleet: Fleet) -> None:
    newcomer = fleet.device("new", None)
    three(fleet)
    eventually(lambda: bool(newcomer.considered))
    assert newcomer.federation.counts["nothing_learned"] == 1


def test_who_learned_nothing_since_uploads_nothing_again(fleet: Fleet) -> None:
    devices = three(fleet)
    up = [device.federation.bytes_up for device in devices]
    assert all(up)
    write(adapter(9), devices[0].path)
    fleet.order("round")
    eventually(lambda: all(device.federation.past.answered == 2 for device in devices))
    eventually(lambda: fleet.look().state.number == 2)
    assert [device.federation.bytes_up - before for device, before in zip(devices, up, strict=True)] == [up[0], 0, 0]
    assert fleet.look().groups[0].group.devices == 3


def test_bytes_are_counted_at_both_ends(fleet: Fleet) -> None:
    devices = three(fleet)
    fleet.end()
    [(up, down)] = fleet.look().traffic.values()
    assert up == sum(device.federation.bytes_up for device in devices)
    assert down == sum(device.federation.bytes_down for device in devices)
    assert up == sum(device.path.stat().st_size for device in devices)


def test_rollback_brings_earlier_files_back(fleet: Fleet) -> None:
    devices = three(fleet)
    first = devices[0].considered[0][0].stem
    for seed, device in enumerate(devices, 11):
        write(adapter(seed), device.path)
    fleet.order("round")
    eventually(lambda: all(len(device.considered) == 2 for device in devices))
    assert devices[0].considered[1][0].stem != first
    fleet.order("rollback", 1)
    eventually(lambda: all(len(device.considered) == 3 for device in devices))
    assert devices[0].considered[2][0].stem == first
    assert [(entry.number, entry.of, entry.why) for entry in fleet.look().history] == [
        (3, 1, "rollback"),
        (2, 2, "round"),
        (1, 1, "round"),
    ]


def test_old_files_go_and_the_present_ones_stay(fleet: Fleet) -> None:
    devices = three(fleet, history=2)
    for number in (2, 3, 4):
        for seed, device in enumerate(devices, 10 * number):
            write(adapter(seed), device.path)
        fleet.order("round")
        eventually(lambda number=number: fleet.look().state.number == number)  # type: ignore[misc]
    eventually(lambda: all(device.federation.past.number == 4 for device in devices))
    fleet.end()
    blobs = {path.stem for path in (fleet.folder / "adapters" / "blobs").iterdir()}
    assert len(blobs) == 2
    assert fleet.look().groups[0].group.blobs[4].id in blobs
    incoming = {path.stem for path in (fleet.folder / "adapters" / "incoming").iterdir()}
    assert incoming == {hashlib.sha256(device.path.read_bytes()).hexdigest() for device in devices}


def test_a_alone_leaves_the_device_and_comes_back_beside_its_own_b(fleet: Fleet) -> None:
    fleet.edge(devices=2, strategy="fedsa")
    devices = [fleet.device(f"d{seed}", adapter(seed), options=replace(SHARE, share="a")) for seed in (1, 2)]
    eventually(lambda: all(device.considered for device in devices))
    for uploaded in (fleet.folder / "adapters" / "incoming").iterdir():
        told = read(uploaded)
        assert told.centroid is None
        assert not any(factors.b.any() for factors in told.factors.values())
        assert uploaded.stat().st_size < 0.75 * devices[0].path.stat().st_size
    mean = sum(adapter(seed).factors["blk.1.attn_q"].a for seed in (1, 2)) / np.float32(2)
    for seed, device in enumerate(devices, 1):
        [(path, slot)] = device.considered
        got = read(path).factors["blk.1.attn_q"]
        assert slot == "own"
        assert np.array_equal(got.b, np.float32(np.float16(adapter(seed).factors["blk.1.attn_q"].b)))
        assert np.allclose(got.a, mean, atol=2e-3)


def test_a_device_that_keeps_its_b_is_silent_where_all_is_wanted(fleet: Fleet) -> None:
    fleet.edge()
    device = fleet.device("d", adapter(1), options=replace(SHARE, share="a"))
    eventually(lambda: device.federation.counts["kept_here"] == 1)
    assert device.federation.counts["offered"] == 0


def frozen(seed: int) -> Adapter:
    start = frozen_start(MODEL, "llama", {"blk.0.attn_q": (32, 48)}, 2, 4.0)
    [(name, each)] = start.factors.items()
    moved = np.random.default_rng(seed).normal(size=each.b.shape).astype(np.float32)
    return replace(start, factors={name: Factors(each.a, moved)})


def test_noise_is_added_once_and_stands_in_both_ledgers(fleet: Fleet) -> None:
    fleet.edge(devices=1, strategy="ffa")
    device = fleet.device("d", frozen(1), options=replace(SHARE, clip=0.5, noise=2.0))
    eventually(lambda: bool(device.considered))
    assert list(noisy_releases(fleet.folder / "adapters")) == [("d", 2.0, 1)]
    assert device.federation.past.leaked == 0.25
    sent = device.federation.past.sent
    fleet.order("round")
    eventually(lambda: device.federation.past.answered == 2)
    assert device.federation.past.sent == sent  # the same, for it has learned nothing: other noise would tell more
    assert device.federation.past.leaked == 0.25
    write(frozen(2), device.path)
    fleet.order("round")
    eventually(lambda: device.federation.past.answered == 3)
    assert device.federation.past.leaked == 0.5
    assert list(noisy_releases(fleet.folder / "adapters")) == [("d", 2.0, 2)]
    assert 0.0 < device.federation.spent < 20.0


def test_without_a_frozen_a_noise_would_not_protect_so_nothing_is_sent(fleet: Fleet) -> None:
    fleet.edge(strategy="ffa")
    device = fleet.device("d", adapter(1), options=replace(SHARE, noise=2.0))
    eventually(lambda: device.federation.counts["nothing_learned"] == 1)
    assert (device.federation.counts["offered"], device.federation.bytes_up) == (0, 0)


def test_an_edge_that_lost_its_database_goes_on_above_with_the_files_that_are_left(fleet: Fleet) -> None:
    devices = three(fleet)
    fleet.order("round")
    eventually(lambda: all(device.federation.past.number == 2 for device in devices))
    fleet.end()
    for each in (fleet.folder / "adapters").glob("*.db*"):
        each.unlink()
    fleet.edge(devices=3)
    eventually(lambda: all(device.federation.past.number > 2 for device in devices))
    assert fleet.look().state.round > 2
    assert fleet.look().groups[0].group.devices == 3


def test_if_aggregating_fails_what_was_agreed_goes_on(fleet: Fleet) -> None:
    devices = three(fleet)
    failed: list[int] = []

    def combine(job: Job) -> Result:
        failed.append(len(job.uploads))
        raise CombineFailed("the process was killed: out of memory")

    fleet.edge(combine, devices=3)
    for seed, device in enumerate(devices, 11):
        write(adapter(seed), device.path)
    fleet.order("round")
    eventually(lambda: failed == [3])
    eventually(lambda: not fleet.look().state.collecting)
    assert fleet.look().state.number == 1
    assert fleet.look().trouble == "the process was killed: out of memory"
    late = fleet.device("late", None)
    eventually(lambda: bool(late.considered))


def test_a_stack_of_too_many_ranks_is_told_and_nobody_is_blamed(fleet: Fleet) -> None:
    def high(seed: int) -> Adapter:
        a = np.float32(0.01 * np.random.default_rng(seed).normal(size=(MOST_RANK - 6, 400)))
        return replace(adapter(seed), factors={"blk.1.attn_q": Factors(a, a.T.copy())})

    fleet.edge(strategy="flora", devices=2)
    devices = [fleet.device(f"d{seed}", high(seed)) for seed in (1, 2)]
    eventually(lambda: fleet.look().trouble != "")
    assert "aggregate fewer devices, or with flexlora" in fleet.look().trouble
    assert (fleet.look().state.number, fleet.look().refusals) == (0, {})
    assert "trouble in the last round: of 2 devices" in adapters_text(fleet.look())
    for seed, device in enumerate(devices):
        write(adapter(seed), device.path)
    fleet.order("round")
    eventually(lambda: fleet.look().state.number == 1)
    assert fleet.look().trouble == ""


def test_a_file_that_cannot_be_read_any_more_leaves_the_others_their_round(tmp_path: Path) -> None:
    uploads = []
    for seed in (1, 2, 3):
        write(adapter(seed), tmp_path / f"{seed}.gguf")
        uploads.append(Upload(f"d{seed}", str(tmp_path / f"{seed}.gguf"), MODEL, 4, 10))
    (tmp_path / "1.gguf").write_bytes(b"GGUF")
    (tmp_path / "made").mkdir()
    job = Job(uploads, "flexlora", [4], [], str(tmp_path / "made"), 2 * 10**9, group=False)
    result = ChildCombiner()(job)
    assert [kept.members for kept in result.made] == [["d2", "d3"]]
    assert list(result.refused) == ["d1"]
    for upload in uploads:
        Path(upload.file).unlink()
    assert ChildCombiner()(job).made == []


def test_a_call_is_answered_once_however_often_it_is_heard(fleet: Fleet) -> None:
    devices = three(fleet)
    heard = devices[0].federation.counts["called"]
    call = AdapterCall(1, 60.0, "http://127.0.0.1:1/v1/adapters", "flexlora", 10**6)
    assert fleet.voice.publish(HOME.path(ADAPTER_CALL, EDGE), encode(call), qos=1)
    fleet.order("round")
    eventually(lambda: all(device.federation.past.answered == 2 for device in devices))
    assert devices[0].federation.counts["called"] == heard + 1
    assert decode_call(encode(call)) == call


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"round": 2}, "future"),
        ({"round": 0}, "late"),
        ({"bytes": 10**8}, "too_large"),
        ({"bytes": 3 * 10**6}, "no_room"),
        ({"share": "a"}, "share"),
        ({"clip": 1.0, "noise": 1e-9}, "noise"),
    ],
)
def test_offers_that_are_refused(fleet: Fleet, values: dict[str, object], reason: str) -> None:
    fleet.edge(most_bytes=4 * 10**6, disk_bytes=2 * 10**6)
    fleet.called(1)
    offer = offer_of(b"x" * 100, 1)
    fleet.offer("d", type(offer)(**{f: values.get(f, getattr(offer, f)) for f in offer.__struct_fields__}))
    eventually(lambda: fleet.look().refusals == {"d": {reason: 1}})
    assert fleet.look().offered == 0


def test_operators_see_and_steer_it(fleet: Fleet, tmp_path: Path) -> None:
    three(fleet)
    config = tmp_path / "edge.toml"
    config.write_text(f'[edge]\nfolder = "{tmp_path}"\n')

    def run(*arguments: str) -> str:
        told = CliRunner().invoke(edge, ["--config", str(config), *arguments], catch_exceptions=False)
        return told.output

    shown = json.loads(run("status", "--json"))["adapters"]
    assert (shown["number"], shown["groups"][0]["devices"], shown["devices"]["uploaded"]) == (1, 3, 3)
    assert shown["traffic"][0]["up"] > 0
    assert "adapters: round 1" in run("status")
    assert "a round begins" in run("round", "--adapters")
    fleet.called(2)
    assert "number 1 is published again" in run("rollback", "--adapters", "--to", "1", "--hold")
    assert json.loads(run("status", "--json"))["adapters"]["held"]
    assert "rounds go on" in run("resume", "--adapters")
    assert "epsilon" in run("privacy")


def test_where_devices_cannot_reach_it_a_url_is_asked_for(tmp_path: Path) -> None:
    section = AdaptersSection(enabled=True, host="0.0.0.0")
    with pytest.raises(ConfigError, match=r"set adapters\.url"):
        assemble(EdgeConfig(edge=Place(folder=str(tmp_path)), adapters=section))
