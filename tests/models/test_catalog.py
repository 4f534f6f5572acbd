from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from models.catalog import DEFAULT, SHIPPED, Catalog, Entry, Hub, LocalFile, Url, Wheels, read
from models.entries import add_entry, entry_toml, remove_entry
from protocol.errors import ConfigError, UnknownModel, UnsafePath

Build = Callable[..., Entry]


def write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_shipped_catalog() -> None:
    catalog = Catalog()
    ids = {listed.entry.id for listed in catalog}
    assert ids == {"smollm2-135m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "gemma3-270m"}
    assert DEFAULT in ids
    for listed in catalog:
        assert listed.shipped
        assert isinstance(listed.entry.sources[0], Hub), "the hub is asked first"
    large = catalog.find("qwen2.5-coder-1.5b").entry.sources[1]
    assert isinstance(large, Wheels)
    assert len(large.requirements) == 22


def test_unknown_id_lists_the_known_ones() -> None:
    with pytest.raises(UnknownModel, match=r"'nope'.*smollm2-135m, qwen2\.5-coder-0\.5b"):
        Catalog().find("nope")


def test_user_entry_overrides_a_shipped_one(tmp_path: Path, entry_of: Build) -> None:
    toml = entry_toml(entry_of("http://example.org/x")).replace('"tiny"', f'"{DEFAULT}"')
    path = write(tmp_path, "mine.toml", toml)
    listed = Catalog(tmp_path).find(DEFAULT)
    assert (listed.entry.name, listed.origin, listed.shipped) == ("Tiny", path, False)


def test_every_source_kind_survives_writing_and_reading(tmp_path: Path, entry_of: Build) -> None:
    sources = [
        Hub("me/repo", "a/b.gguf"),
        Wheels(["part1==1.0", "part2==1.0"], "*/part*.bin"),
        Url("https://example.org/ünï"),
        LocalFile('/data/"quoted" \\ \x7f'),
    ]
    path = write(tmp_path, "mine.toml", entry_toml(entry_of(*sources)))
    assert read(path)[0].sources == sources


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("size = 1000003", "size = -1", r"mine\.toml: entry 'tiny', field size: Expected `int` >= 1"),
        ("context = 128", 'context = "big"', r"mine\.toml: entry 'tiny', field context: Expected `int`"),
        ('sha256 = "', 'sha256 = "zz', r"mine\.toml: entry 'tiny', field sha256"),
        ("context = 128", "", r"mine\.toml: entry 'tiny': .*missing required field `context`"),
        ("context = 128", "context = 128\nsurprise = 1", r"entry 'tiny': .*unknown field `surprise`"),
        ('kind = "url"', 'kind = "ftp"', r"entry 'tiny', field sources\[0\]\.kind: Invalid value 'ftp'"),
        ('url = "http:', 'url = "file:', r"entry 'tiny', field sources\[0\]\.url"),
        ("[[models]]", "[[model]]", r"mine\.toml: unknown key model; allowed"),
        ("[[models]]", "[[models]", r"mine\.toml: not valid TOML"),
    ],
)
def test_wrong_entry_names_file_entry_and_field(
    tmp_path: Path, entry_of: Build, old: str, new: str, message: str
) -> None:
    text = entry_toml(entry_of("http://example.org/x"))
    assert old in text
    write(tmp_path, "mine.toml", text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message):
        Catalog(tmp_path)


@pytest.mark.parametrize("requirement", ["-r==1", "x", "x>=1", "x @ http://example.org/x.whl", "x==1 --pre", "../x==1"])
def test_only_pinned_requirements_are_accepted(tmp_path: Path, entry_of: Build, requirement: str) -> None:
    write(tmp_path, "mine.toml", entry_toml(entry_of(Wheels([requirement], "*"))))
    with pytest.raises(ConfigError, match=r"field sources\[0\]\.requirements"):
        Catalog(tmp_path)


@pytest.mark.parametrize("name", ["../up.gguf", "/etc/passwd", "a/b.gguf", "..", ".hidden", "a\\b", "with space", ""])
def test_file_outside_the_folder_is_refused(tmp_path: Path, entry_of: Build, name: str) -> None:
    write(tmp_path, "mine.toml", entry_toml(entry_of("http://example.org/x", file=name)))
    with pytest.raises((UnsafePath, ConfigError), match=r"mine\.toml: entry 'tiny', field file"):
        Catalog(tmp_path)


@pytest.mark.parametrize("source", [Hub("me/repo", "../x"), Wheels(["x==1"], "/etc/*"), Wheels(["x==1"], "a/../b")])
def test_source_path_outside_its_folder_is_refused(tmp_path: Path, entry_of: Build, source: Hub | Wheels) -> None:
    write(tmp_path, "mine.toml", entry_toml(entry_of(source)))
    with pytest.raises(UnsafePath, match=r"mine\.toml: entry 'tiny', field sources\[0\]"):
        Catalog(tmp_path)


def test_two_entries_of_one_id_are_refused(tmp_path: Path, entry_of: Build) -> None:
    text = entry_toml(entry_of("http://example.org/x"))
    write(tmp_path, "a.toml", text)
    write(tmp_path, "b.toml", text)
    with pytest.raises(ConfigError, match=r"b\.toml: entry 'tiny' already stands in .*a\.toml"):
        Catalog(tmp_path)
    (tmp_path / "a.toml").unlink()
    write(tmp_path, "b.toml", text + text)
    with pytest.raises(ConfigError, match="stands there twice"):
        Catalog(tmp_path)


def test_one_file_name_for_two_contents_is_refused(tmp_path: Path, entry_of: Build) -> None:
    taken = read(SHIPPED)[0].file
    write(tmp_path, "mine.toml", entry_toml(entry_of("http://example.org/x", file=taken)))
    with pytest.raises(ConfigError, match=f"field file: {taken} is also the file of entry 'smollm2-135m'"):
        Catalog(tmp_path)


def test_add_and_remove(tmp_path: Path, entry_of: Build) -> None:
    folder = tmp_path / "models.d"
    path = add_entry(entry_of("http://example.org/x"), folder)
    assert path == folder / "tiny.toml"
    with pytest.raises(ConfigError, match=r"holds an entry 'tiny' already"):
        add_entry(entry_of("http://example.org/y"), folder)
    remove_entry(Catalog(folder).find("tiny"))
    assert list(folder.iterdir()) == []
    assert "tiny" not in Catalog(folder)


def test_removing_keeps_neighbours_and_comments(tmp_path: Path, entry_of: Build) -> None:
    text = entry_toml(entry_of("http://example.org/x"))
    first, last = (text.replace('"tiny"', f'"{name}"').replace("tiny.gguf", name) for name in ("first", "last"))
    path = write(tmp_path, "mine.toml", f"# my models\n{first}\n{text}\n{last}")
    remove_entry(Catalog(tmp_path).find("tiny"))
    assert path.read_text() == f"# my models\n{first}\n{last}"


FILES = {"model.onnx": b"graph", "sub/model.onnx.data": b"weights"}
GIVEN_SHA256 = "0123456789abcdef" * 4


def test_folder_survives_writing_and_reading(tmp_path: Path, entry_of: Build, folder_entry: Build) -> None:
    entry = folder_entry(FILES, Hub("me/repo", "."), Url("https://example.org/x/"), LocalFile("/data/x"))
    path = write(
        tmp_path,
        "mine.toml",
        entry_toml(entry) + entry_toml(entry_of("http://example.org/x")).replace('"tiny"', '"other"'),
    )
    assert read(path)[0] == entry
    remove_entry(Catalog(tmp_path).find("tiny"))
    assert [entry.id for entry in read(path)] == ["other"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 5}, "files: they have 12 bytes together, size says 5"),
        ({"sha256": GIVEN_SHA256}, f"files: their hashes give [0-9a-f]{{64}}, sha256 says {GIVEN_SHA256}"),
        ({"sources": [Wheels(["x==1"], "*")]}, "files: wheels hold one file"),
    ],
)
def test_folder_that_contradicts_itself(
    tmp_path: Path, folder_entry: Build, fields: dict[str, Any], message: str
) -> None:
    fields = {key: msgspec.to_builtins(value) for key, value in fields.items()}
    text = entry_toml(folder_entry(FILES, "http://example.org/x"))
    document = tomllib.loads(text)["models"][0] | fields
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert(document, Entry)
    write(tmp_path, "mine.toml", text.replace("size = 12", "size = 13", 1))
    with pytest.raises(
        ConfigError, match=r"mine\.toml: entry 'tiny': files: they have 12 bytes together, size says 13"
    ):
        Catalog(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"weights.bin": b"x"}, "there is no model.onnx"),
        ({"model.onnx": b"x", "model.onnx/data": b"x"}, "model.onnx is a file and a folder"),
    ],
)
def test_files_that_are_no_folder(folder_entry: Build, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        folder_entry(files, "http://example.org/x")


def test_one_path_twice_is_refused(folder_entry: Build) -> None:
    entry = folder_entry(FILES, "http://example.org/x")
    with pytest.raises(ValueError, match="a path stands there twice"):
        msgspec.structs.replace(entry, files=[*entry.files, entry.files[0]])


@pytest.mark.parametrize(
    "path",
    ["../up", "/etc/passwd", "a/../../up", ".git/config", "a//b", "./a", "a\\b", "a b", "a\n", "a.partial/b", ""],
)
def test_part_outside_the_folder_is_refused(tmp_path: Path, folder_entry: Build, path: str) -> None:
    write(tmp_path, "mine.toml", entry_toml(folder_entry(FILES | {path: b"x"}, "http://example.org/x")))
    with pytest.raises((UnsafePath, ConfigError), match=r"mine\.toml: entry 'tiny', field files"):
        Catalog(tmp_path)


@pytest.mark.parametrize("name", ["x.partial", "x.gguf.wheels", "x.old", "x.lock", "x.sha256.json"])
def test_name_of_what_stands_beside_a_model_is_refused(tmp_path: Path, entry_of: Build, name: str) -> None:
    write(tmp_path, "mine.toml", entry_toml(entry_of("http://example.org/x", file=name)))
    with pytest.raises(UnsafePath, match=r"field file: '.*' ends like what Skerry keeps beside a model"):
        Catalog(tmp_path)


def test_one_name_for_a_file_and_a_folder_is_refused(tmp_path: Path, entry_of: Build, folder_entry: Build) -> None:
    """Also where they claim one hash, and where only the manifests differ."""
    folder = folder_entry(FILES, "http://example.org/x", id="folder")
    same = msgspec.structs.replace(entry_of("http://example.org/x", file="tiny"), sha256=folder.sha256)
    other = folder_entry(FILES | {"manifest.json": b"{}"}, "http://example.org/x", id="other")
    for second in (same, other):
        write(tmp_path, "mine.toml", entry_toml(folder) + entry_toml(second))
        with pytest.raises(ConfigError, match="field file: tiny is also the file of entry"):
            Catalog(tmp_path)


def test_removing_refuses_what_it_cannot_cut(tmp_path: Path, entry_of: Build) -> None:
    entry = entry_of("http://example.org/x")
    inline = ", ".join(line for line in entry_toml(entry).splitlines()[1:11] if line)
    body = f'models = [{{ {inline}, sources = [{{ kind = "url", url = "http://example.org/x" }}] }},'
    second = body[len("models = [") : -1].replace('"tiny"', '"other"').replace("tiny.gguf", "other.gguf")
    path = write(tmp_path, "mine.toml", f"{body} {second}]\n")
    before = path.read_text()
    with pytest.raises(ConfigError, match="remove it with an editor"):
        remove_entry(Catalog(tmp_path).find("tiny"))
    assert path.read_text() == before
