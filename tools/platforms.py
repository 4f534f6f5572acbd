"""What a board would have to compile: `python -m tools.platforms`, a part of `make check`.

The packages of the device's install, and all that they need, must have wheels for aarch64 Linux, except those of
`BUILT`. The user's own pip resolves them, with the user's own index, and nothing is installed or compiled. It takes
wheels alone into account, as `pip install --prefer-binary` of docs/install.md does.
"""

from __future__ import annotations

import json
import os
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import click
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from protocol.errors import LinkError, SkerryError
from tools.pip import NoWheel, Pip, Target

PYTHONS = ("3.11", "3.12", "3.13")  # of Debian 12, Ubuntu 24.04, Debian 13
EXTRAS = ("onnx",)  # of pyproject.toml, that a device may install too

# Known to build on a board with `apt install build-essential python3-dev`, and with what else, which must be wheels.
BUILT: dict[str, tuple[str, ...]] = {
    "annoy": ("setuptools",),
    "llama-cpp-python": ("scikit-build-core", "cmake", "ninja"),
}


@dataclass(frozen=True)
class Report:
    """`wheels` and `missing` by version of Python: what is installed as a wheel, and what has none."""

    wheels: dict[str, dict[str, str]]
    missing: dict[str, list[str]]
    built: dict[str, str]  # package: version of its source
    unneeded: dict[str, str]  # exception: why it is none

    @property
    def good(self) -> bool:
        return not any(self.missing.values()) and not self.unneeded


def device_requirements(pyproject: Path) -> list[str]:
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *(line for extra in EXTRAS for line in extras[extra])]


def examine(
    requirements: Iterable[str], built: Mapping[str, Sequence[str]], pythons: Sequence[str], pip: Pip
) -> Report:
    """Raises LinkError if the index does not answer, SkerryError if pip finds no solution for another reason."""
    wanted = [Requirement(line) for line in requirements]
    sources = [line for line in wanted if canonicalize_name(line.name) in built]
    packages = [line for line in wanted if line not in sources]
    for source in sources:
        packages += [Requirement(line) for line in (*built[canonicalize_name(source.name)], *_needs(source.name))]
    with ThreadPoolExecutor() as pool:  # most of the time is the index's
        found = list(pool.map(lambda python: _resolve(packages, Target(python), pip), pythons))
    return Report(
        wheels={python: wheels for python, (wheels, _) in zip(pythons, found, strict=True)},
        missing={python: missing for python, (_, missing) in zip(pythons, found, strict=True)},
        built={source.name: _source_of(source, pip) for source in sources},
        unneeded=_unneeded(built, sources, pythons, pip),
    )


def _needs(package: str) -> list[str]:
    """What a source needs to run. Only a build would tell, so it is asked of the one that is installed here."""
    try:
        return metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        raise SkerryError(f"{package} is not installed here, so what it needs is not known: `make check`") from None


def _resolve(requirements: Sequence[Requirement], target: Target, pip: Pip) -> tuple[dict[str, str], list[str]]:
    """Package and version of each wheel, and what has no wheel."""
    wanted = target.applying(requirements)
    missing: dict[str, str] = {}
    while True:
        try:
            items = pip.resolve([line for line in wanted if canonicalize_name(line.name) not in missing], target)
        except NoWheel as error:
            own = any(canonicalize_name(line.name) == canonicalize_name(error.requirement.name) for line in wanted)
            parent = f" (from {error.parent})" if error.parent else ""
            lacking = f"{error.requirement}{parent}: only source, {_source_of(error.requirement, pip)}"
            missing[canonicalize_name(error.requirement.name)] = lacking
            if error.parent or not own:  # pip looks at nothing else as long as this is in its way
                return {}, list(missing.values())
            continue
        found: dict[str, str] = {
            canonicalize_name(item["metadata"]["name"]): item["metadata"]["version"] for item in items
        }
        known = found.keys() | missing.keys()
        hidden = [line for line in _needed_by(items, target) if canonicalize_name(line.name) not in known]
        if not hidden:
            return found, list(missing.values())
        wanted += hidden


def _needed_by(items: Sequence[dict[str, Any]], target: Target) -> list[Requirement]:
    """On the target: pip itself reads `; python_version < "3.13"` for the Python that it runs in."""
    lines: list[Requirement] = []
    for item in items:
        needs = [Requirement(line) for line in item["metadata"].get("requires_dist", [])]
        lines += target.applying(needs, item.get("requested_extras", []))
    return lines


def _source_of(requirement: Requirement, pip: Pip) -> str:
    """Version of the source that would be compiled. Raises LinkError if there is nothing at all."""
    versions = pip.versions(requirement.name, "--no-binary=:all:")
    fitting = sorted(requirement.specifier.filter(versions))
    if not fitting:
        raise LinkError(
            f"pip finds no source of {requirement}, nor a wheel: does the package index answer "
            f"(`pip index versions {requirement.name}`)? If it does, {requirement.name} cannot be installed on aarch64"
        )
    return str(fitting[-1])


def _has_wheel(source: Requirement, target: Target, pip: Pip) -> bool:
    """Not asked of `pip index versions`: before pip 24 it lists sources too, whatever the options."""
    try:
        pip.resolve(target.applying([source]), target)
    except NoWheel as error:
        return canonicalize_name(error.requirement.name) != canonicalize_name(source.name)
    return True


def _unneeded(
    built: Mapping[str, Sequence[str]], sources: Sequence[Requirement], pythons: Sequence[str], pip: Pip
) -> dict[str, str]:
    used = {canonicalize_name(source.name): source for source in sources}
    reasons = {name: "not a package of the device's install" for name in built if name not in used}
    for name, source in used.items():
        if all(_has_wheel(source, Target(python), pip) for python in pythons):
            reasons[name] = "has wheels now"
    return reasons


def _text(report: Report) -> str:
    lines = [f"{package} {version}: compiled on the device" for package, version in report.built.items()]
    for python, missing in report.missing.items():
        lines += [f"Python {python}: NO WHEEL of {lacking}; pin it, or name it in BUILT" for lacking in missing]
    lines += [f"{name}: {why}; take it out of BUILT" for name, why in report.unneeded.items()]
    counts = ", ".join(f"{len(wheels)} for Python {python}" for python, wheels in report.wheels.items() if wheels)
    verdict = "all else are wheels" if report.good else "not as tools/platforms.py says"
    return "\n".join([*lines, f"aarch64 Linux: {verdict}" + (f" ({counts})" if counts else "")])


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def platforms(as_json: bool) -> None:
    """Check that a device's install needs no compiler but for what is known to build there; else exit code 1."""
    requirements = device_requirements(Path(__file__).parent.parent / "pyproject.toml")
    report = examine(requirements, BUILT, PYTHONS, Pip(os.environ))
    click.echo(json.dumps(asdict(report) | {"good": report.good}) if as_json else _text(report))
    sys.exit(0 if report.good else 1)


def main() -> None:
    try:
        platforms()
    except SkerryError as error:
        click.echo(f"tools.platforms: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
