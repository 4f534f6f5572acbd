"""What a board would have to compile, as the real pip finds it in a folder of tiny packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from protocol.errors import LinkError, SkerryError
from tools.pip import Pip
from tools.platforms import Report, device_requirements, examine

ROOT = Path(__file__).parents[2]
BOTH = ("3.11", "3.13")


@pytest.fixture
def links(tmp_path: Path) -> Path:
    """The only place where pip looks."""
    folder = tmp_path / "links"
    folder.mkdir()
    return folder


@pytest.fixture
def env(tmp_path: Path, links: Path) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    return own | {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(links)}


def wheel(links: Path, name: str, *requires: str, version: str = "1.0", tag: str = "py3-none-any") -> None:
    info = f"{name}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {line}\n" for line in requires)
    with zipfile.ZipFile(links / f"{name}-{version}-{tag}.whl", "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")


def source(links: Path, name: str, version: str = "1.0") -> None:
    with tarfile.open(links / f"{name}-{version}.tar.gz", "w:gz"):
        pass


def look(
    env: dict[str, str],
    *requirements: str,
    built: dict[str, tuple[str, ...]] | None = None,
    pythons: tuple[str, ...] = ("3.11",),
) -> Report:
    return examine(requirements, built or {}, pythons, Pip(env))


def test_wheels_for_the_board_are_found_with_all_that_they_need(links: Path, env: dict[str, str]) -> None:
    wheel(links, "parent", "child>=1", 'speed; extra == "fast"')
    for python in ("311", "313"):
        wheel(links, "child", tag=f"cp{python}-cp{python}-manylinux_2_28_aarch64")
    report = look(env, "parent", pythons=BOTH)
    assert report.wheels == {python: {"parent": "1.0", "child": "1.0"} for python in BOTH}
    assert report.good


@pytest.mark.parametrize("tag", ["cp311-cp311-manylinux_2_28_x86_64", "cp311-cp311-manylinux_2_39_aarch64"])
def test_wheel_for_another_processor_or_a_newer_system_is_none(links: Path, env: dict[str, str], tag: str) -> None:
    wheel(links, "native", tag=tag)
    source(links, "native")
    wheel(links, "pure")
    report = look(env, "native>=1", "pure")
    assert report.missing["3.11"] == ["native>=1: only source, 1.0"]
    assert report.wheels["3.11"] == {"pure": "1.0"}  # it looks on
    assert not report.good


def test_wheel_for_one_python_only(links: Path, env: dict[str, str]) -> None:
    wheel(links, "native", tag="cp311-cp311-manylinux2014_aarch64")
    source(links, "native")
    assert look(env, "native", pythons=BOTH).missing == {"3.11": [], "3.13": ["native: only source, 1.0"]}


def test_what_a_package_needs_has_no_wheel(links: Path, env: dict[str, str]) -> None:
    wheel(links, "parent", "child")
    source(links, "child")
    assert look(env, "parent").missing["3.11"] == ["child (from parent): only source, 1.0"]


def test_markers_are_the_boards(links: Path, env: dict[str, str]) -> None:
    """Neither those of this machine's processor nor of the Python that runs the check."""
    wheel(links, "parent", 'board; platform_machine == "aarch64"', 'newer; python_version >= "3.13"', "both")
    wheel(links, "board", 'deeper; platform_machine == "aarch64"')
    wheel(links, "both")
    source(links, "newer")
    source(links, "deeper")
    report = look(env, "parent", 'absent; sys_platform == "win32"', pythons=BOTH)
    assert report.missing["3.11"] == ["deeper: only source, 1.0"]
    assert report.missing["3.13"] == ["newer: only source, 1.0", "deeper: only source, 1.0"]


def test_known_source_is_an_exception(links: Path, env: dict[str, str]) -> None:
    """annoy is installed here, so what it needs is known; the real one needs nothing."""
    source(links, "annoy", "1.16")
    source(links, "annoy", "1.17.3")
    source(links, "annoy", "2.0")
    wheel(links, "setuptools")
    assert look(env, "annoy<2").missing["3.11"] == ["annoy<2: only source, 1.17.3"]
    report = look(env, "annoy<2", built={"annoy": ("setuptools",)})
    assert report.built == {"annoy": "1.17.3"}
    assert report.wheels["3.11"] == {"setuptools": "1.0"}
    assert report.good


def test_what_a_known_source_needs_must_be_wheels(links: Path, env: dict[str, str]) -> None:
    """llama-cpp-python, as it is installed here, needs four packages; and it needs another to be built."""
    source(links, "llama_cpp_python", "0.3.36")
    for name in ("diskcache", "numpy", "typing_extensions"):
        wheel(links, name, version="99")
    source(links, "jinja2", "99")
    source(links, "tool")
    report = look(env, "llama-cpp-python==0.3.36", built={"llama-cpp-python": ("tool",)})
    assert [Requirement(lacking.partition(":")[0]).name for lacking in report.missing["3.11"]] == ["tool", "jinja2"]


def test_exception_that_is_none_any_more(links: Path, env: dict[str, str]) -> None:
    source(links, "annoy")
    wheel(links, "annoy", tag="cp311-cp311-manylinux_2_28_aarch64")
    built: dict[str, tuple[str, ...]] = {"annoy": ()}
    assert look(env, "annoy", built=built, pythons=BOTH).good  # Python 3.13 has to compile it
    wheel(links, "annoy", tag="cp313-cp313-manylinux_2_28_aarch64")
    assert look(env, "annoy", built=built, pythons=BOTH).unneeded == {"annoy": "has wheels now"}
    wheel(links, "other")
    report = look(env, "other", built=built)
    assert report.unneeded == {"annoy": "not a package of the device's install"}
    assert not report.good


def test_requirements_that_contradict_each_other(links: Path, env: dict[str, str]) -> None:
    for version in ("1.0", "2.0"):
        wheel(links, "child", version=version)
    wheel(links, "one", "child<2")
    wheel(links, "two", "child>=2")
    with pytest.raises(SkerryError, match=r"Python 3\.11: ERROR: Cannot install one==1\.0 and two==1\.0"):
        look(env, "one", "two")


def test_index_that_does_not_answer_is_an_error(links: Path, env: dict[str, str]) -> None:
    del env["PIP_NO_INDEX"]
    env |= {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}
    with pytest.raises(LinkError, match="does the package index answer"):
        look(env, "parent")
    with pytest.raises(LinkError, match="does the package index answer"):
        look(env, "annoy", built={"annoy": ()})


def test_command_tells_what_a_device_would_miss(links: Path, env: dict[str, str]) -> None:
    """All that pyproject.toml names is there, but for one that has only source."""
    named = [Requirement(line) for line in device_requirements(ROOT / "pyproject.toml")]
    pinned = {line.name: str(line.specifier)[2:] for line in named if str(line.specifier).startswith("==")}
    versions = {line.name: "99" for line in named} | pinned
    assert {"aiohttp", "onnxruntime", "tokenizers"} <= versions.keys()
    assert not {"torch", "optimum-onnx"} & versions.keys()  # the build machine's
    for name in ("setuptools", "scikit-build-core", "cmake", "ninja", "diskcache", "typing-extensions"):
        versions[name] = "99"
    for name, version in versions.items():
        has_source = name in ("annoy", "llama-cpp-python", "msgspec")
        (source if has_source else wheel)(links, name.replace("-", "_"), version=version)
    done = subprocess.run([sys.executable, "-m", "tools.platforms", "--json"], env=env, cwd=ROOT, capture_output=True)
    told = json.loads(done.stdout)
    assert done.returncode == 1
    assert told["built"] == {name: versions[name] for name in ("annoy", "llama-cpp-python")}
    assert all(missing == ["msgspec>=0.19: only source, 99"] for missing in told["missing"].values())
    assert "aiohttp" in told["wheels"]["3.12"]
    (links / "msgspec-99.tar.gz").unlink()
    done = subprocess.run([sys.executable, "-m", "tools.platforms"], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == LinkError.exit_code
    assert done.stderr.startswith("tools.platforms: pip finds no source of msgspec>=0.19, nor a wheel")
