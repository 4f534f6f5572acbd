"""Each check of `skerry doctor`, on machines that are small file trees and on servers that misbehave."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

from agent.adapt.store import AdapterStore
from agent.config import Adapt, AgentConfig, Api, Cloud, Device, Model
from agent.doctor import examine, machine, model
from agent.doctor.api import check_api
from agent.doctor.cloud import check_cloud
from agent.doctor.finding import Finding
from agent.doctor.training import check_training
from models import latency
from models.boards import processor
from models.catalog import Catalog
from models.fingerprint import fingerprint
from models.footprint import Shape, footprint, read_shape
from models.latency import DecodePoint, DecodeTable
from models.store import Places
from protocol.resolve import Hello, encode
from tests.agent.adapt.adapters import small_file

GB = 1_000_000_000
TREES = {
    "pi5": {
        "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
        "proc/meminfo": "MemTotal:        8244736 kB\nMemFree:  1 kB\nMemAvailable:    7021568 kB\n",
    },
    "jetson": {
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
        "proc/meminfo": "MemTotal:        7802056 kB\nMemAvailable:    5242880 kB\n",
    },
    "pc": {
        "sys/class/dmi/id/sys_vendor": "Dell Inc.\n",
        "sys/class/dmi/id/product_name": "Precision 3660\n",
        "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA RTX A2000\nIRQ:   \t\t 168\n",
        "proc/meminfo": "MemTotal:       32768000 kB\nMemAvailable:   30000000 kB\n",
    },
}


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def levels(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.level, finding.subject) for finding in findings]


@pytest.mark.parametrize(
    ("tree", "architecture", "board", "accelerator", "memory"),
    [
        ("pi5", "aarch64", "Raspberry Pi 5 Model B Rev 1.0", "", 8_442_609_664),
        ("jetson", "aarch64", "NVIDIA Jetson Orin Nano Developer Kit", "NVIDIA Jetson GPU (L4T 36.4.3)", 7_989_305_344),
        ("pc", "x86_64", "Dell Inc. Precision 3660", "NVIDIA RTX A2000", 33_554_432_000),
    ],
)
def test_a_machine_is_recognised(
    tree: str, architecture: str, board: str, accelerator: str, memory: int, tmp_path: Path
) -> None:
    found = machine.read_machine(plant(tmp_path, TREES[tree]), architecture, 4)
    assert (found.board, found.architecture, found.cores) == (board, architecture, 4)
    assert (found.accelerator, found.memory) == (accelerator, memory)
    assert found.available is not None
    assert found.available < memory
    assert machine.check_machine(found).level == "ok"


def test_an_accelerator_is_worth_a_remark_only_if_it_lies_idle(tmp_path: Path) -> None:
    jetson = machine.read_machine(plant(tmp_path / "jetson", TREES["jetson"]), "aarch64", 6)
    pi = machine.read_machine(plant(tmp_path / "pi5", TREES["pi5"]), "aarch64", 4)
    assert machine.check_accelerator(jetson, "onnx", offload=True).level == "ok"
    assert "GGML_CUDA" in machine.check_accelerator(jetson, "gguf", offload=False).remedy
    assert "build of onnxruntime does not use" in machine.check_accelerator(jetson, "onnx", offload=False).text
    assert machine.check_accelerator(pi, "gguf", offload=False) == Finding(
        "ok", "accelerator", "none: the model runs on the CPU"
    )


def test_an_nvidia_device_without_driver_details_is_seen(tmp_path: Path) -> None:
    found = machine.read_machine(plant(tmp_path, {"dev/nvidia0": "", "dev/nvidiactl": ""}), "x86_64", 8)
    assert found.accelerator == "NVIDIA GPU 0"


def test_a_control_groups_limit_is_what_counts(tmp_path: Path) -> None:
    """The tightest of the groups around the process; file pages are given back on demand."""
    files = {
        "proc/self/cgroup": "0::/system.slice/skerry.service\n",
        "sys/fs/cgroup/system.slice/skerry.service/memory.max": "max\n",
        "sys/fs/cgroup/system.slice/memory.max": "1000000000\n",
        "sys/fs/cgroup/system.slice/memory.current": "900000000\n",
        "sys/fs/cgroup/system.slice/memory.stat": "anon 5\nfile 9\ninactive_file 300000000\nactive_file 100000000\n",
    }
    found = machine.read_machine(plant(tmp_path, TREES["pi5"] | files), "aarch64", 4)
    assert (found.memory, found.available) == (1_000_000_000, 500_000_000)


def test_an_unreadable_machine_is_a_finding_and_not_a_crash(tmp_path: Path) -> None:
    found = machine.read_machine(tmp_path, "riscv64", 1)
    assert (found.board, found.memory, found.accelerator) == ("unknown board", None, "")
    assert machine.check_machine(found).level == "warn"


def test_disk_and_clock(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    assert machine.check_disk(folder, missing=0).level in ("ok", "warn")
    full = machine.check_disk(folder, missing=1 << 60)
    assert full.level == "error"
    assert "SKERRY_MODELS" in full.remedy
    assert machine.check_clock(0.0).level == "warn"
    assert machine.check_clock(1_800_000_000.0).level == "ok"


# The model


def test_the_footprint_is_file_context_and_process(smollm2: Path) -> None:
    shape = read_shape(smollm2)
    assert shape == Shape(98_362_432, 8192, 30 * 3 * (64 + 64), 134_479_872)
    assert footprint(shape, Model(context=4096, kv="f16")) == 98_362_432 + (4096 + 256) * 11_520 * 2 + 150_000_000
    assert footprint(shape, Model(context=1 << 20)) == footprint(shape, Model(context=8192))
    assert footprint(shape, Model(repack=True)) - footprint(shape, Model()) == shape.file


def test_training_is_possible_where_torch_memory_and_model_allow_it(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AgentConfig(device=Device(folder=str(tmp_path)))
    assert not (tmp_path / "adapters").exists()
    fine = check_training(config, smollm2, 4 * GB)
    assert (fine.level, fine.subject) == ("ok", "training")
    assert fine.text.startswith("adapters in use: none; rank 64 fits 1,907 MB")
    assert not (tmp_path / "adapters").exists(), "it only looks"
    path = small_file(tmp_path, 1, fingerprint(smollm2))
    store = AdapterStore(tmp_path / "adapters", fingerprint(smollm2))
    store.commit("own", store.add(path, "own").id, "trained")
    tight = check_training(config, smollm2, GB)
    assert tight.level == "warn"
    assert f"in use: own {store.state().slots['own'][:12]}; training needs" in tight.text
    strange = tmp_path / "strange.gguf"
    strange.write_bytes(smollm2.read_bytes()[: 4 << 20].replace(b"llama", b"mamba"))
    assert "architecture mamba cannot be trained" in check_training(config, strange, 4 * GB).text
    monkeypatch.setattr("agent.doctor.training.installed", lambda: False)
    without = check_training(config, smollm2, 4 * GB)
    assert (without.level, without.remedy) == ("warn", "pip install 'skerry[train]'")
    assert check_training(msgspec.structs.replace(config, adapt=Adapt(enabled=False)), smollm2, GB).level == "ok"


def test_what_does_not_fit_is_told_with_a_context_that_does() -> None:
    shape = Shape(file=GB, context=32_768, cell=14_336, weights=10**9)
    assert model.check_memory(shape, Model(context=32_768), 2 * GB).level == "ok"
    tight = model.check_memory(shape, Model(context=32_768), int(1.3 * GB))
    assert tight.level == "error"
    context = int(tight.remedy.rpartition(" ")[2])
    assert 256 <= context < 32_768
    assert model.check_memory(shape, Model(context=context), int(1.3 * GB)).level == "ok"
    assert model.check_memory(shape, Model(), GB).remedy == "choose a smaller model"


def test_a_machine_without_room_for_any_model_is_told() -> None:
    catalog = Catalog()
    assert model.check_catalog(catalog, Model(), 100_000_000).level == "warn"
    some = model.check_catalog(catalog, Model(), 800_000_000)
    assert some.level == "ok"
    assert some.text.index("smollm2-135m") < some.text.index("too large") < some.text.index("qwen2.5-coder-1.5b")


def test_settings_that_make_no_sense_together() -> None:
    shape = Shape(1, 8192, 1, 1)
    config = AgentConfig(model=Model(context=16_384, threads=8), api=Api(max_tokens=8192))
    findings = list(model.check_settings(shape, config, cores=4))
    assert levels(findings) == [("warn", "context"), ("error", "context"), ("warn", "threads")]
    assert not list(model.check_settings(shape, AgentConfig(), cores=4))


def test_a_model_is_missing_unknown_or_damaged(tmp_path: Path) -> None:
    places, catalog = Places(tmp_path, tmp_path / "none"), Catalog()
    path, missing = model.find_model(catalog, "smollm2-135m", places)
    assert (path, missing.level, missing.remedy) == (None, "error", "skerry models pull smollm2-135m")
    assert model.missing_bytes(catalog, "smollm2-135m", places) == 98_362_432
    assert model.find_model(catalog, "gpt-5", places)[1].level == "error"
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    _, damaged = model.find_model(catalog, "smollm2-135m", places)
    assert "4 bytes instead of" in damaged.text
    assert damaged.remedy == "skerry models pull smollm2-135m"


def test_a_model_that_loads_writes_and_one_that_is_cut_off_does_not(smollm2: Path, tmp_path: Path) -> None:
    tokenizer, writing = model.check_writing(smollm2, Model(threads=1), hidden=True)
    assert (writing.level, writing.subject) == ("ok", "engine")
    assert "tok/s (llama.cpp, threads: 1)" in writing.text
    assert tokenizer is not None
    cut = tmp_path / "cut.gguf"
    with smollm2.open("rb") as whole:
        cut.write_bytes(whole.read(4_000_000))
    assert model.check_writing(cut, Model(), hidden=True)[1].level == "error"


def test_a_model_in_onnx_says_what_it_runs_on_and_that_it_is_not_trained(
    smollm2_int4: Path, smollm2: Path, tmp_path: Path
) -> None:
    here = replace(machine.read_machine(plant(tmp_path, TREES["pc"]), "x86_64", 2), accelerator="NVIDIA RTX A2000")
    config = AgentConfig(
        model=Model(name=str(smollm2_int4), threads=1, providers=["cpu"]),
        device=Device(folder=str(tmp_path)),
        api=Api(port=0),
    )
    places = Places(tmp_path, tmp_path / "none")
    found = {finding.subject: finding for finding in examine.examine_agent(config, places, here, time.time())}
    assert "(onnxruntime on cpu, threads: 1)" in found["engine"].text
    assert (found["training"].level, found["training"].remedy) == ("warn", "or set adapt.enabled = false")
    assert "ONNX take no adapters" in found["training"].text
    uses = machine.offloads("onnx")
    assert found["accelerator"].level == ("ok" if uses else "warn")
    wrong = msgspec.structs.replace(config, model=Model(name=str(smollm2), engine="onnx"))
    *_, error = [f for f in examine.examine_agent(wrong, places, here, time.time()) if f.subject == "model"]
    assert (error.level, error.remedy) == ("error", "correct model.engine or model.name")
    assert "skerry models export" in error.text


def test_a_whole_examination_names_the_missing_model_and_goes_on(tmp_path: Path) -> None:
    pi = machine.read_machine(plant(tmp_path, TREES["pi5"]), "aarch64", 4)
    places = Places(tmp_path / "models", tmp_path / "entries")
    findings = list(examine.examine_agent(AgentConfig(api=Api(port=0)), places, pi, time.time()))
    assert [subject for _, subject in levels(findings)] == ["catalog", "disk", "model", "cloud", "api"]
    assert levels(findings)[2:] == [("error", "model"), ("ok", "cloud"), ("ok", "api")]


def test_a_model_that_does_not_fit_is_not_loaded(smollm2: Path, tmp_path: Path) -> None:
    small = replace(machine.read_machine(plant(tmp_path, TREES["pi5"]), "aarch64", 4), available=200_000_000)
    config = AgentConfig(model=Model(name=str(smollm2)), api=Api(port=0))
    findings = list(examine.examine_agent(config, Places(tmp_path, tmp_path / "none"), small, time.time()))
    assert ("error", "memory") in levels(findings)
    assert "engine" not in [subject for _, subject in levels(findings)]


def test_what_was_measured_by_length_of_context_is_told(smollm2: Path, tmp_path: Path) -> None:
    """And a cloud that gets less time than one token of the SLM takes is a warning."""
    shape = read_shape(smollm2)
    config = AgentConfig(model=Model(context=1000), device=Device(folder=str(tmp_path)))
    (unknown,) = model.check_speed(smollm2, shape, config, cores=2)
    assert (unknown.level, unknown.remedy) == ("ok", "skerry models fit --model smollm2-135m")
    points = (DecodePoint(100, 20.0, 50.0), DecodePoint(1000, 10.0, 50.0))
    latency.save(tmp_path, DecodeTable(fingerprint(smollm2), "gguf", processor(), 2, points, 0.0))
    (known,) = model.check_speed(smollm2, shape, config, cores=2)
    assert known.text == "measured 20.0 tok/s, and 10.0 after 1000 tokens of context"
    asking = msgspec.structs.replace(config, cloud=Cloud(url="http://cloud:1", deadline_ms=99))
    found = list(model.check_speed(smollm2, shape, asking, cores=2))
    assert levels(found) == [("ok", "speed"), ("warn", "deadline")]
    assert "above 100" in found[1].remedy
    enough = msgspec.structs.replace(config, cloud=Cloud(url="http://cloud:1", deadline_ms=100))
    assert levels(list(model.check_speed(smollm2, shape, enough, cores=2))) == [("ok", "speed")]
    other = msgspec.structs.replace(config, model=Model(threads=1))
    assert "not measured" in next(model.check_speed(smollm2, shape, other, cores=2)).text


def test_misspelt_variables_are_found() -> None:
    env = {"SKERRY_CLOUD_ULR": "x", "SKERRY_CLOUD_KEY": "x", "PATH": "/bin"}
    found = list(examine.examine_variables(env, {"SKERRY_CLOUD_URL", "SKERRY_CLOUD_KEY"}))
    assert levels(found) == [("warn", "configuration")]
    assert found[0].remedy == "did you mean SKERRY_CLOUD_URL?"


# The cloud


@asynccontextmanager
async def serving(*routes: web.RouteDef) -> AsyncIterator[str]:
    app = web.Application()
    app.add_routes(routes)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def healthy(request: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


def greeting(*frames: bytes | str) -> web.RouteDef:
    """A resolver that sends these frames and then nothing more."""

    async def resolve(request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        for frame in frames:
            await (ws.send_bytes(frame) if isinstance(frame, bytes) else ws.send_str(frame))
        async for _ in ws:
            pass
        return ws

    return web.get("/v1/resolve", resolve)


def refusing(status: int) -> web.RouteDef:
    async def resolve(request: web.Request) -> web.Response:
        return web.Response(status=status)

    return web.get("/v1/resolve", resolve)


def examine_cloud(*routes: web.RouteDef, key: str = "") -> list[Finding]:
    async def run() -> list[Finding]:
        async with serving(*routes) as url:
            return await check_cloud(Cloud(url=url, key=key), "a" * 64, time.time(), timeout=0.5)

    return asyncio.run(run())


HEALTH = web.get("/health", healthy)


def test_no_cloud_is_all_right() -> None:
    assert asyncio.run(check_cloud(Cloud(), None, 0.0)) == [
        Finding("ok", "cloud", "none configured: this device works alone")
    ]


@pytest.mark.parametrize(("theirs", "words"), [("a" * 64, "token ids"), ("b" * 64, "another one"), ("", "not known")])
def test_a_cloud_that_is_all_right(theirs: str, words: str) -> None:
    findings = examine_cloud(HEALTH, greeting(encode(Hello("llm", theirs, True, 64))))
    assert levels(findings) == [("ok", "cloud"), ("ok", "tokenizer")]
    assert "model llm" in findings[0].text
    assert words in findings[1].text


@pytest.mark.parametrize(
    ("routes", "key", "words"),
    [
        ([HEALTH, refusing(401)], "wrong", "refuses the key"),
        ([HEALTH, refusing(401)], "", "wants a key, and none is set"),
        ([HEALTH, refusing(503)], "", "shutting down or full"),
        ([HEALTH], "", "no Skerry cloud: /v1/resolve gives HTTP 404"),
        ([], "", "no Skerry cloud: GET /health gives HTTP 404"),
        ([HEALTH, greeting("hello")], "", "no Skerry cloud"),
        ([HEALTH, greeting(b"\xc1\xc1")], "", "no Skerry cloud"),
        ([HEALTH, greeting()], "", "opens no WebSocket within 0.5 s"),
    ],
)
def test_a_cloud_that_is_not(routes: list[web.RouteDef], key: str, words: str) -> None:
    findings = examine_cloud(*routes, key=key)
    assert levels(findings) == [("error", "cloud")]
    assert words in findings[0].text
    assert findings[0].remedy


def test_another_version_and_another_time_are_warnings() -> None:
    async def old(request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"}, headers={"Date": "Thu, 01 Jan 2026 00:00:00 GMT"})

    findings = examine_cloud(web.get("/health", old), greeting(encode(Hello("llm", "", True, 64, version=7))))
    assert levels(findings)[2:] == [("warn", "protocol"), ("warn", "clock")]
    assert findings[2].remedy == "update Skerry on this device"


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """Takes connections, as far as the kernel does, and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=1) as listener:
        yield listener


@pytest.mark.parametrize("url", ["cloud.example:8431", "ftp://cloud.example", "http://", "http://host:port"])
def test_a_url_that_is_none(url: str) -> None:
    (finding,) = asyncio.run(check_cloud(Cloud(url=url), None, 0.0))
    assert finding.level == "error"
    assert "is not a URL" in finding.text


def test_a_cloud_that_refuses_connections() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    (finding,) = asyncio.run(check_cloud(Cloud(url=f"http://127.0.0.1:{port}"), None, 0.0))
    assert f"127.0.0.1:{port} refuses connections" in finding.text
    assert "skerry serve" in finding.remedy


def test_a_cloud_that_says_nothing(silent: socket.socket) -> None:
    url = f"http://127.0.0.1:{silent.getsockname()[1]}"
    (finding,) = asyncio.run(check_cloud(Cloud(url=url), None, 0.0, timeout=0.3))
    assert "takes the connection but says nothing within 0.3 s" in finding.text


def test_a_cloud_whose_packets_are_dropped(silent: socket.socket) -> None:
    address = silent.getsockname()
    waiting = [socket.socket() for _ in range(4)]  # more than the backlog takes: later ones get no answer at all
    for client in waiting:
        client.setblocking(False)
        client.connect_ex(address)
    (finding,) = asyncio.run(check_cloud(Cloud(url=f"http://127.0.0.1:{address[1]}"), None, 0.0, timeout=0.3))
    for client in waiting:
        client.close()
    assert "does not take a connection within 0.3 s" in finding.text
    assert "firewall" in finding.remedy


def test_tls_with_a_plain_server() -> None:
    async def run() -> list[Finding]:
        async with serving(HEALTH) as url:
            return await check_cloud(Cloud(url=url.replace("http", "https")), None, 0.0)

    (finding,) = asyncio.run(run())
    assert "no TLS" in finding.text


# The API's port


def test_a_port_that_is_free_or_taken_by_something_else(silent: socket.socket) -> None:
    assert asyncio.run(check_api(Api(port=0))).level == "ok"
    taken = asyncio.run(check_api(Api(port=silent.getsockname()[1])))
    assert (taken.level, taken.remedy) == ("error", "stop it, or choose another api.port")


def test_an_address_that_is_not_allowed_or_not_here() -> None:
    assert "api.key" in asyncio.run(check_api(Api(host="0.0.0.0", port=0))).remedy
    assert asyncio.run(check_api(Api(host="0.0.0.0", port=0, key="k"))).level == "ok"
    elsewhere = asyncio.run(check_api(Api(host="192.0.2.1", port=0, key="k")))
    assert (elsewhere.level, elsewhere.remedy) == ("error", "correct api.host")
