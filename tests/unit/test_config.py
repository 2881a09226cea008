"""Configuration: what the documented file means, and that every mistake is told with file, key and reason."""

from __future__ import annotations

import grp
import json
import math
import os
import pwd
import re
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from instantstart_fs.cli import run
from instantstart_fs.config import Capacity, load_config, places, units
from instantstart_fs.config.loader import schema
from instantstart_fs.config.template import TEMPLATE, commented
from instantstart_fs.config.units import (
    parse_capacity,
    parse_duration,
    parse_group,
    parse_mode,
    parse_owner,
    parse_rate,
    parse_size,
)
from instantstart_fs.core.manifest import ModelSpec
from instantstart_fs.errors import ConfigError
from tests.harness import REPOSITORY

FULL = """
region = "eu"
[mount]
path = "{root}/models"
transport = "auto"
[store]
path = "{root}/store"
capacity = "500GiB"
low_watermark = 0.5
high_watermark = 0.9
scrub = "30d"
scrub_rate = "20MB"
[fill]
workers = 3
connections = 8
chunk_size = "4MiB"
read_deadline = "2m"
serve_unsealed = "never"
[eviction]
keep_hot = "7d"
[staging]
enabled = false
threads = 2
max_memory = "25%"
[origins]
recheck_access = "24h"
on_refusal = "report"
[origins.huggingface]
endpoint = "https://hub.example"
token_file = "{root}/token"
[origins.s3]
endpoint_url = "http://127.0.0.1:8333"
region_name = "eu-central-1"
profile = "ml"
[pipelines.my-llm]
source = "hf://org/repo@main"
owner = "1000:1001"
mode = "0550"
include = ["*.safetensors"]
pinned = true
[pipelines.voice.models]
asr = "s3://bucket/asr"
tts = {{ source = "file:///data/tts", exclude = ["*.bin"] }}
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("INSTANTSTART_CONFIG", raising=False)
    (tmp_path / "token").write_text("secret")

    def write(text: str, name: str = "config.toml") -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return str(path)

    return write


def test_the_documented_file(write, tmp_path: Path) -> None:
    config = load_config(write(FULL.format(root=tmp_path)))
    assert (config.region, config.file) == ("eu", str(tmp_path / "config.toml"))
    assert (config.mount.path, config.mount.transport) == (f"{tmp_path}/models", "auto")
    assert config.store.capacity == Capacity(bytes=500 * 2**30)
    assert (config.store.low_watermark, config.store.high_watermark) == (0.5, 0.9)
    assert (config.store.scrub, config.store.scrub_rate) == (30 * 86400, 20_000_000)
    assert (config.fill.worker_count, config.fill.connections, config.fill.chunk_size) == (3, 8, 4 * 2**20)
    assert (config.fill.read_deadline, config.fill.serve_unsealed) == (120.0, "never")
    assert config.eviction.keep_hot == 7 * 86400
    assert config.staging.max_memory.of(1000) == 250
    assert config.origins.huggingface.token_file == str(tmp_path / "token")
    assert config.origins.s3.profile == "ml"
    assert (config.origins.recheck_access, config.origins.on_refusal) == (86400, "report")
    llm, voice = config.pipelines
    assert (llm.id, llm.uid, llm.gid, llm.mode, llm.pinned) == ("my-llm", 1000, 1001, 0o550, True)
    assert llm.models == (ModelSpec("hf://org/repo@main", "", ("*.safetensors",)),)
    assert voice.models == (
        ModelSpec("s3://bucket/asr", "asr"),
        ModelSpec("file:///data/tts", "tts", (), ("*.bin",)),
    )


def test_defaults_need_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instantstart_fs.config.places.SYSTEM_CONFIG", str(tmp_path / "absent.toml"))
    monkeypatch.delenv("INSTANTSTART_CONFIG", raising=False)
    config = load_config(mount=str(tmp_path / "m"), store=str(tmp_path / "s"))
    assert config.file is None
    assert config.pipelines == ()
    assert (config.fill.chunk_size, config.fill.read_deadline, config.eviction.keep_hot) == (8 << 20, 60.0, 172800.0)
    assert config.store.capacity.of(1000) == 800
    assert 2 <= config.fill.worker_count <= 4


def test_an_ordinary_user_gets_places_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    user = os.getuid() or 1000
    os.chown(tmp_path, user, -1)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setenv("HOME", "/home/alice")
    for name in ("XDG_DATA_HOME", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "INSTANTSTART_SOCKET"):
        monkeypatch.delenv(name, raising=False)
    assert places.default_mount() == "/home/alice/models"
    assert places.default_store() == "/home/alice/.cache/instantstart/store"
    assert places.default_socket() == "/home/alice/.cache/instantstart/control.sock"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert places.default_socket() == f"{tmp_path}/instantstart/control.sock"
    assert places.spare_mount() == f"{tmp_path}/instantstart/models"
    (tmp_path / "instantstart" / "slots").mkdir(parents=True)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert places.default_store() == f"{tmp_path}/instantstart", "a store of release 0.1 is used on"
    monkeypatch.setattr(places, "SYSTEM_CONFIG", str(tmp_path / "machine.toml"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert places.find_config() is None
    (tmp_path / "machine.toml").touch()
    assert places.find_config() == str(tmp_path / "machine.toml")
    (tmp_path / "instantstart" / "config.toml").touch()
    assert places.find_config() == str(tmp_path / "instantstart" / "config.toml")


def test_the_environment_names_the_file_and_options_win(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTANTSTART_CONFIG", write(FULL.format(root=tmp_path)))
    config = load_config(store=str(tmp_path / "other"))
    assert config.store.path == str(tmp_path / "other")
    assert config.mount.path == f"{tmp_path}/models"


def test_pipelines_d_holds_one_pipeline_per_file(write, tmp_path: Path) -> None:
    file = write('[pipelines.a]\nsource = "hf://o/a"\n')
    write('source = "hf://o/b"\npinned = true\n', "pipelines.d/b.toml")
    write("not toml at all", "pipelines.d/b.toml.bak")
    config = load_config(file)
    assert [spec.id for spec in config.pipelines] == ["a", "b"]
    assert config.pipelines[1].pinned
    write('source = "hf://o/a"\n', "pipelines.d/a.toml")
    with pytest.raises(ConfigError, match=r"pipelines\.d/a\.toml: the pipeline 'a' is already in .*config\.toml"):
        load_config(file)


REGIONAL = '[regional]\nkey_file = "/etc/region.key"'


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        ("[fill]\nconections = 3", "fill.conections", "unknown key"),
        ("colour = 1", "colour", "unknown key"),
        ('[pipelines.x]\nsource = "hf://o/r"\nnope = 1', "nope", "unknown key"),
        ('[fill]\nconnections = "many"', "fill.connections", "Expected `int`"),
        ("[fill]\nconnections = 0", "fill.connections", "not from 1 to 1024"),
        ('[fill]\nchunk_size = "8 Mega"', "fill.chunk_size", "not a size"),
        ('[fill]\nchunk_size = "5000"', "fill.chunk_size", "multiple of 4 KiB"),
        ('[fill]\nread_deadline = "soon"', "fill.read_deadline", "not a duration"),
        ("[fill]\nread_deadline = 0", "fill.read_deadline", "less than 100ms"),
        ('[fill]\nserve_unsealed = "maybe"', "fill.serve_unsealed", "Invalid enum value"),
        ('[fill]\nworkers = "lots"', "fill.workers", "neither"),
        ('[store]\ncapacity = "120%"', "store.capacity", "between 0% and 100%"),
        ('[store]\ncapacity = "0"', "store.capacity", "more than 0"),
        ("[store]\nlow_watermark = 0.99", "store.low_watermark", "above high_watermark"),
        ('[origins]\nrecheck_access = "daily"', "origins.recheck_access", 'neither "off" nor a duration'),
        ('[origins]\non_refusal = "panic"', "origins.on_refusal", "Invalid enum value"),
        ('[store]\nscrub = "weekly"', "store.scrub", 'neither "off" nor a duration'),
        ('[store]\nscrub = "10ms"', "store.scrub", "less than a second"),
        ('[store]\nscrub_rate = "10KB"', "store.scrub_rate", "less than 1MB"),
        ("[store]\nhigh_watermark = 95.0", "store.high_watermark", "between 0 and 1"),
        ('[store]\npath = "relative/store"', "store.path", "not an absolute path"),
        ('[store]\npath = "/proc/version/store"', "store.path", "/proc/version is not a directory"),
        ('[mount]\npath = "/dev/null"', "mount.path", "not a directory"),
        ('[mount]\npath = "/x"\n[store]\npath = "/x/store"', "mount.path", "may not lie in one another"),
        ('[mount]\ntransport = "nfs"', "mount.transport", "none of auto"),
        ('[eviction]\nkeep_hot = "-1h"', "eviction.keep_hot", "not a duration"),
        ('[staging]\nmax_memory = "half"', "staging.max_memory", "neither a size"),
        ('[origins.huggingface]\nendpoint = "hub"', "origins.huggingface.endpoint", "http"),
        ('[http]\ntoken_file = "/t"\napi_token_file = "/t"', "http.api_token_file", "who may look would administer"),
        ('[origins.huggingface]\ntoken_file = "no/such"', "origins.huggingface.token_file", "not an absolute path"),
        (f'{REGIONAL}\nurl = "http://tier"', "regional.url", "neither s3://bucket/prefix nor file:///directory"),
        (f'{REGIONAL}\nurl = "file://relative"', "regional.url", "neither s3://"),
        (f'{REGIONAL}\nurl = "s3://bb"\nupstream = ["gs://c"]', "regional.upstream", "'gs://c' is neither"),
        (f'{REGIONAL}\nurl = "s3://bb"\nendpoint_url = "tier:8333"', "regional.endpoint_url", "http"),
        (f'{REGIONAL}\nurl = "s3://bb"\nhost = "a host"', "regional.host", "'a host' is no host"),
        (f'{REGIONAL}\nurl = "s3://bb"\nrate = "fast"', "regional.rate", "not a "),
        (f'{REGIONAL}\nurl = "s3://bb"\ncapacity = "much"', "regional.capacity", "not a size"),
        (f'{REGIONAL}\nurl = "s3://bb"\nverify = "never"', "regional.verify", "Invalid enum value"),
        (f'{REGIONAL}\nurl = "s3://bb"\nwrite_back = "yes"', "regional.write_back", "Expected `bool`"),
        (f'{REGIONAL}\nurl = "s3://bb"\nrack = "a rack"', "regional.rack", "'a rack' is no rack's name"),
        (f'{REGIONAL}\nurl = "s3://bb"\nrack_listen = "10.0.0.1:80"', "regional.rack_listen", "without regional.rack"),
        (f'{REGIONAL}\nurl = "s3://bb"\nrack = "r"\nrack_listen = "gpu-1:80"', "regional.rack_listen", "no IP address"),
        (f'{REGIONAL}\nurl = "s3://bb"\nrack = "r"\nrack_listen = "0.0.0.0:80"', "regional.rack_listen", "no IP"),
        (f'{REGIONAL}\nurl = "s3://bb"\nrack = "r"\nrack_rate = "fast"', "regional.rack_rate", "not a "),
        ('[regional]\nurl = "s3://bb"', "regional", "key_file"),
        ('[regional]\nurl = "s3://bb"\nkey_file = "key"', "regional.key_file", "not an absolute path"),
        ('[pipelines.x]\nsource = "ftp://o/r"', "pipelines.x", "unknown scheme"),
        ("[pipelines.x]\npinned = true", "pipelines.x", "either `source` or"),
        ('[pipelines.".x"]\nsource = "hf://o/r"', "pipelines..x", "cannot be a pipeline id"),
        ('[pipelines.x]\nsource = "hf://o/r"\nmode = "0777"', "pipelines.x", "write bits"),
        ('[pipelines.x]\nsource = "hf://o/r"\nowner = "no-such-user-here"', "pipelines.x", "does not know"),
        ('[pipelines.x]\nsource = "hf://o/r"\ntoken_file = "such"', "pipelines.x.token_file", "not an absolute path"),
        ("[mount", "", "not valid TOML"),
    ],
)
def test_mistakes_are_told_with_file_key_and_reason(write, text: str, key: str, reason: str) -> None:
    file = write(text)
    with pytest.raises(ConfigError) as raised:
        load_config(file)
    assert raised.value.message.startswith(f"{file}: ")
    assert key in raised.value.message
    assert reason in raised.value.message
    assert "\n" not in raised.value.message


def test_credentials_that_are_not_at_hand_keep_no_daemon_from_starting(write) -> None:
    config = load_config(write('[pipelines.x]\nsource = "hf://o/r"\ntoken_file = "/no/such"'))
    assert [spec.token_file for spec in config.pipelines] == ["/no/such"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[store]\ncapacity = '80%'\ncapacity = '70%'\n", "not valid TOML: Cannot overwrite a value (at line 3"),
        ("[store]\r\n[store]\r\n", "not valid TOML: Cannot declare"),
        ("a = " + "[" * 100_000, "not valid TOML: "),
        ("[store]\npath = '/\udcff'\n", "not valid TOML: 'utf-8' codec can't decode"),
        ("# " + "x" * (16 << 20), "has more than 16 MiB: is it a configuration?"),
    ],
    ids=["a key twice", "a table twice", "deep", "latin-1", "large"],
)
def test_a_file_that_is_no_configuration_is_refused_by_name(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError) as caught:
        load_config(str(file))
    assert caught.value.message.startswith(f"{file}: {says}")


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe.toml")
    for path, says in (
        (pipe, "is a pipe"),
        (tmp_path, "Is a directory"),
        (Path("/dev/zero"), "has more than"),
        (tmp_path / "new.toml", "No such file or directory"),
    ):
        with pytest.raises(ConfigError, match=f"{path}: {says}"):
            load_config(str(path))
    (tmp_path / "pipelines.d").mkdir()
    (tmp_path / "config.toml").touch()
    os.mkfifo(tmp_path / "pipelines.d" / "p.toml")
    with pytest.raises(ConfigError, match=r"pipelines\.d/p\.toml: is a pipe"):
        load_config(str(tmp_path / "config.toml"))
    assert load_config("/dev/null").pipelines == ()
    terminal, other = os.openpty()
    with pytest.raises(ConfigError, match="is a terminal"):
        load_config(os.ttyname(other))
    os.close(terminal)
    os.close(other)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(ConfigError):
            load_config(str(tmp_path))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_of_another_systems_editor_is_read(tmp_path: Path) -> None:
    """With a byte order mark, and lines that end with CR LF."""
    file = tmp_path / "config.toml"
    file.write_bytes(b"\xef\xbb\xbf# caf\xc3\xa9\r\n[fill]\r\nconnections = 7\r\n")
    assert load_config(str(file)).fill.connections == 7


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (8, 8),
        ("8", 8),
        ("8MiB", 8 << 20),
        ("8M", 8 << 20),
        ("8MB", 8_000_000),
        ("1.5GiB", 3 << 29),
        ("2 TB", 2 * 10**12),
    ],
)
def test_sizes(value: str | int, size: int) -> None:
    assert parse_size(value) == size


@pytest.mark.parametrize("value", ["", "MiB", "-1", "8mib", "1e9", "8 MiB extra", -1, True])
def test_bad_sizes(value: str | int) -> None:
    with pytest.raises(ConfigError):
        parse_size(value)


@pytest.mark.parametrize(
    ("value", "seconds"), [(60, 60), (0.5, 0.5), ("60s", 60), ("500ms", 0.5), ("48h", 172800), ("7d", 604800)]
)
def test_durations(value: str | float, seconds: float) -> None:
    assert parse_duration(value) == seconds


def test_a_user_database_that_hangs_is_an_error_and_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def hangs(_: object) -> None:
        over.wait(50)
        raise KeyError

    monkeypatch.setattr(units, "LOOKUP_SECONDS", 0.05)
    monkeypatch.setattr(pwd, "getpwnam", hangs)
    monkeypatch.setattr(grp, "getgrnam", hangs)
    for ask in (lambda: parse_owner("alice"), lambda: parse_owner("1:ml"), lambda: parse_group("ml")):
        with pytest.raises(ConfigError, match=r"user database .* does not answer within 0\.05 s; numbers"):
            ask()
    assert parse_owner("1:2") == (1, 2), "numbers ask nobody"
    assert not over.is_set()
    over.set()


def test_capacity_modes_and_owners() -> None:
    assert parse_capacity("80%") == Capacity(fraction=0.8)
    assert (parse_mode("0555"), parse_mode(0o500)) == (0o555, 0o500)
    assert parse_owner("12:34") == (12, 34)
    assert parse_owner("root") == (0, 0)
    for bad in ("", ":", "1:", "5000000000:1"):
        with pytest.raises(ConfigError):
            parse_owner(bad)
    for bad_mode in ("999", 0o1555, "0755", -1):
        with pytest.raises(ConfigError):
            parse_mode(bad_mode)


NINES = "9" * 5000


@pytest.mark.parametrize(
    "text", ["1e-300", "nan", "inf", "-1", "0", "0.5", "999KB", "1e9", "9" * 30, NINES, "8EiB", "٣MB", ""]
)
def test_a_rate_that_nothing_would_ever_end_at_is_none(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_rate(text)


def test_rates_that_are_some() -> None:
    assert [parse_rate(text) for text in ("1MB", "200MB", 2_000_000)] == [1_000_000, 200_000_000, 2_000_000]


@pytest.mark.parametrize(
    ("parse", "values"),
    [
        (parse_size, [NINES, int("9" * 30), "9" * 20, "9000000TiB", "1e3", "nan", "inf", -1]),
        (parse_capacity, ["1e-300%", "nan%", "inf%", NINES + "%", "1_0%", "9" * 25]),
        (parse_duration, [NINES + "d", "9" * 19 + "d", "1e3s", "inf", "nan", math.nan, math.inf, -1, 10**400]),
        (parse_group, [NINES, 2**32 - 1, 10**400, -1]),
        (parse_owner, [f"{NINES}:0", f"0:{NINES}", f"{2**32 - 1}:0", "-1:0"]),
    ],
)
def test_numbers_without_bounds_are_refused_in_one_short_line(
    parse: Callable[[object], object], values: list[object]
) -> None:
    for value in values:
        with pytest.raises(ConfigError) as refused:
            parse(value)
        assert len(refused.value.message) < 200


@pytest.mark.parametrize(
    "line",
    [
        f"[fill]\nconnections = {NINES}",
        "[fill]\nread_deadline = nan",
        "[fill]\nread_deadline = 1e-300",
        "[store]\nlow_watermark = nan",
        "[store]\nhigh_watermark = inf",
        '[store]\nscrub_rate = "1KB"',
        f'[http]\nlisten = "127.0.0.1:{NINES}"',
        f"a = {'[' * 5000}{']' * 5000}",
    ],
)
def test_a_file_with_such_numbers_is_refused_by_name(write, line: str) -> None:
    path = write(line)
    with pytest.raises(ConfigError, match=r"config\.toml"):
        load_config(path)


def test_the_template_is_the_documented_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sets nothing, knows every key, and what it shows are the defaults."""
    monkeypatch.setattr(places, "SYSTEM_CONFIG", str(tmp_path / "absent.toml"))
    monkeypatch.delenv("INSTANTSTART_CONFIG", raising=False)
    assert f"```toml\n{TEMPLATE}```" in (REPOSITORY / "docs" / "CONFIGURATION.md").read_text()
    mount, store = str(tmp_path / "m"), str(tmp_path / "s")
    assert re.findall(r"(?m)^[^#\[\s].*", commented(mount, store)) == []
    file = tmp_path / "config.toml"
    file.write_text(TEMPLATE.replace("/models", mount, 1).replace("/var/lib/instantstart", store, 1))
    assert msgspec.structs.replace(load_config(str(file)), file=None) == load_config(mount=mount, store=store)
    parts = [
        part
        for part in schema()["$defs"].values()
        if part["title"] not in ("PipelineTable", "_Regional", "_Upstream", "_Model")
    ]
    keys = {key for part in parts for key in part["properties"]} - {"regional", "pipelines"}
    assert [key for key in sorted(keys) if f"{key} = " not in TEMPLATE and f"{key}]" not in TEMPLATE] == []


def test_config_init_check_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "new" / "config.toml")
    assert run(["config", "init", file]) == 0 and run(["config", "init", file]) == 2
    assert run(["config", "check", file]) == 0 and "good, 0 pipelines" in capsys.readouterr().out
    assert run(["config", "show", "--config", file, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fill"]["connections"] == 16
    text = Path(file).read_text().replace("# connections =", "conections =")
    Path(file).write_text(text)
    assert run(["config", "check", file]) == 2
    assert "fill.conections: unknown key (did you mean 'connections'?)" in capsys.readouterr().err
    Path(file).write_text('[origins.huggingface]\nendpoint = "https://me:secret@hub.example/x"\n')
    for how in ([], ["--json"]):
        assert run(["config", "show", "--config", file, *how]) == 0
        said = capsys.readouterr().out
        assert "https://hub.example/x" in said and "secret" not in said
    assert run(["config", "schema"]) == 0 and "read_deadline" in capsys.readouterr().out
