"""Configuration: every mistake names the file (or variable), the key and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest
from msgspec import Meta

from agent.config import AgentConfig
from protocol.config import Key, keys, load
from protocol.errors import ConfigError


class Link(msgspec.Struct, frozen=True):
    url: Annotated[str, Meta(description="where to")] = ""
    share: Annotated[float, Meta(ge=0.0, le=1.0, description="how much")] = 0.5
    tries: Annotated[int, Meta(ge=1, le=9, description="how often")] = 3
    mode: Annotated[Literal["fast", "slow"], Meta(description="how")] = "fast"
    on: Annotated[bool, Meta(description="whether")] = True
    names: Annotated[list[str], Meta(description="whom")] = msgspec.field(default_factory=list)
    size: Annotated[int, Meta(ge=16, description="how large")] = 64


class Other(msgspec.Struct, frozen=True):
    url: Annotated[str, Meta(description="another")] = "x"


class Config(msgspec.Struct, frozen=True):
    link: Link = Link()
    other: Other = Other()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "skerry.toml"


def refused(path: Path, text: str, env: dict[str, str] | None = None) -> str:
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(Config, path, env or {})
    return str(caught.value)


class TestGood:
    def test_nothing_is_the_defaults(self, path: Path) -> None:
        path.write_text("")
        assert load(Config, path, {}) == load(Config, None, {}) == Config()

    def test_the_file_is_read(self, path: Path) -> None:
        path.write_text(
            '[link]\nurl = "http://a"\nshare = 1\ntries = 9\nmode = "slow"\non = false\nnames = ["a", "b"]\n'
            '[other]\nurl = ""\n'
        )
        link = Link(url="http://a", share=1.0, tries=9, mode="slow", on=False, names=["a", "b"])
        assert load(Config, path, {}) == Config(link, Other(""))

    def test_the_environment_has_the_last_word(self, path: Path) -> None:
        path.write_text('[link]\ntries = 2\nmode = "slow"\n')
        env = {
            "SKERRY_LINK_TRIES": "7",
            "SKERRY_LINK_SHARE": "0.25",
            "SKERRY_LINK_ON": "false",
            "SKERRY_LINK_NAMES": "a, b,,c ",
            "SKERRY_OTHER_URL": "12",
            "SKERRY_UNRELATED": "x",
            "PATH": "/bin",
        }
        config = load(Config, path, env)
        assert config.link == Link(share=0.25, tries=7, mode="slow", on=False, names=["a", "b", "c"])
        assert config.other.url == "12"

    @pytest.mark.parametrize(("text", "value"), [("1", True), ("true", True), ("0", False), ("False", False)])
    def test_truth_in_the_environment(self, text: str, value: bool) -> None:
        assert load(Config, None, {"SKERRY_LINK_ON": text}).link.on is value


class TestBad:
    def test_key(self, path: Path) -> None:
        message = refused(path, "[link]\nthreshhold = 1\n")
        assert str(path) in message
        assert "link.threshhold" in message
        for name in ("url", "share", "tries", "mode", "on", "names"):
            assert name in message

    def test_key_of_another_section(self, path: Path) -> None:
        assert "other.tries" in refused(path, "[other]\ntries = 1\n")

    def test_section(self, path: Path) -> None:
        message = refused(path, "[lnik]\nurl = 'x'\n")
        assert str(path) in message
        assert "[lnik]" in message
        assert "link, other" in message

    def test_key_outside_a_section(self, path: Path) -> None:
        message = refused(path, "tries = 3\n")
        assert str(path) in message
        assert "tries" in message
        assert "link, other" in message

    @pytest.mark.parametrize("text", ["link = 3\n", 'link = "x"\n', "[[link]]\nurl = 'x'\n"])
    def test_section_that_is_none(self, path: Path, text: str) -> None:
        message = refused(path, text)
        assert str(path) in message
        assert "link" in message

    @pytest.mark.parametrize(
        ("text", "key", "allowed"),
        [
            ("tries = 0", "link.tries", "integer 1 to 9"),
            ("tries = 10", "link.tries", "integer 1 to 9"),
            ("tries = 2.5", "link.tries", "integer 1 to 9"),
            ('tries = "3"', "link.tries", "integer 1 to 9"),
            ("tries = true", "link.tries", "integer 1 to 9"),
            ("size = 1", "link.size", "integer from 16"),
            ("share = 1.01", "link.share", "number 0.0 to 1.0"),
            ("share = nan", "link.share", "number 0.0 to 1.0"),
            ("share = inf", "link.share", "number 0.0 to 1.0"),
            ('mode = "medium"', "link.mode", "fast, slow"),
            ("on = 1", "link.on", "true, false"),
            ('names = "a"', "link.names", "list of text"),
            ("names = [1]", "link.names", "list of text"),
            ("url = 5", "link.url", "text"),
            ("url = {a = 1}", "link.url", "text"),
        ],
    )
    def test_value(self, path: Path, text: str, key: str, allowed: str) -> None:
        message = refused(path, f"[link]\n{text}\n")
        assert str(path) in message
        assert key in message
        assert f"allowed: {allowed}" in message

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("TRIES", "0"),
            ("TRIES", "three"),
            ("TRIES", ""),
            ("SHARE", "2"),
            ("SHARE", "nan"),
            ("MODE", "medium"),
            ("ON", "maybe"),
        ],
    )
    def test_value_in_the_environment(self, path: Path, name: str, value: str) -> None:
        message = refused(path, "", {f"SKERRY_LINK_{name}": value})
        assert f"SKERRY_LINK_{name}" in message
        assert f"link.{name.lower()}" in message
        assert "allowed: " in message
        assert str(path) not in message

    @pytest.mark.parametrize("text", ["[link", "link]", "[link]\ntries = \n", "[link]\ntries = 1\ntries = 2\n"])
    def test_toml(self, path: Path, text: str) -> None:
        message = refused(path, text)
        assert str(path) in message
        assert "TOML" in message

    def test_file_that_is_not_text(self, path: Path) -> None:
        path.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ConfigError, match=r"skerry\.toml"):
            load(Config, path, {})

    def test_file_that_is_absent(self, path: Path) -> None:
        with pytest.raises(ConfigError, match=r"skerry\.toml: cannot be read: No such file"):
            load(Config, path, {})
        with pytest.raises(ConfigError, match="directory"):
            load(Config, path.parent, {})


class TestKeys:
    def test_tell_what_the_documentation_shows(self) -> None:
        shown = {f"{key.section}.{key.name}": key for key in keys(Config)}
        assert list(shown) == [*(f"link.{name}" for name in Link.__struct_fields__), "other.url"]
        assert shown["link.tries"] == Key("link", "tries", 3, "integer 1 to 9", "how often")
        assert shown["link.tries"].env == "SKERRY_LINK_TRIES"
        assert shown["link.names"].default == []

    def test_of_the_agent_are_all_described(self) -> None:
        listed = list(keys(AgentConfig))
        assert len({key.env for key in listed}) == len(listed) > 20
        assert all(key.description and key.allowed for key in listed)

    def test_defaults_of_the_agent_are_allowed(self, path: Path) -> None:
        text = ""
        for key in keys(AgentConfig):
            value = str(key.default).lower() if isinstance(key.default, bool) else repr(key.default)
            text += f"[{key.section}]\n" if f"[{key.section}]" not in text else ""
            text += f"{key.name} = {value}\n"
        path.write_text(text)
        assert load(AgentConfig, path, {}) == AgentConfig()


@pytest.mark.parametrize("url", ["localhost:8431", "ftp://a", "http://[::1", "http://a:123456", "http://a b"])
def test_a_cloud_url_that_can_not_be_one_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"cloud\.url.*http"):
        load(AgentConfig, None, {"SKERRY_CLOUD_URL": url})


@pytest.mark.parametrize(
    "url", ["", "http://a:8431", "https://cloud.example/skerry", "ws://127.0.0.1:1", "http://[::1]:8431"]
)
def test_a_cloud_url_that_can_be_one_is_taken(url: str) -> None:
    assert load(AgentConfig, None, {"SKERRY_CLOUD_URL": url}).cloud.url == url


def test_a_misspelt_variable_of_a_known_section_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean SKERRY_POLICY_THRESHOLD"):
        load(AgentConfig, None, {"SKERRY_POLICY_TRESHOLD": "1"})
    load(AgentConfig, None, {"SKERRY_LISTEN_PORT": "1", "SKERRY_MODELS": "/tmp"})  # of `skerry serve`, and of all
