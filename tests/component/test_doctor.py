"""The doctor's findings: what is fine is ok, what is not is told with what to do, and nothing raises or hangs."""

from __future__ import annotations

import base64
import http.server
import json
import socket
import threading
from pathlib import Path

import msgspec
import pytest

from instantstart_fs import doctor
from instantstart_fs.cli import run
from instantstart_fs.config import Config, MountConfig, StoreConfig
from instantstart_fs.config.sections import RegionalConfig, UpstreamConfig
from instantstart_fs.control.protocol import DaemonInfo
from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.core.status import TierStatus
from instantstart_fs.doctor import Check
from instantstart_fs.origins.registry import OriginSettings
from instantstart_fs.regional.directory import DirectoryStore
from instantstart_fs.regional.heartbeats import HostRecord, object_of
from instantstart_fs.regional.keys import RegionKey
from instantstart_fs.regional.records import Seal, chunk_name, pack, seal_name
from tests.servers.blackhole import BlackHole


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(MountConfig(str(tmp_path / "models")), StoreConfig(str(tmp_path / "deep" / "store")))


@pytest.fixture(autouse=True)
def no_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTANTSTART_SOCKET", str(tmp_path / "none.sock"))
    monkeypatch.delenv("INSTANTSTART_CONFIG", raising=False)


def spec(source: str) -> PipelineSpec:
    return PipelineSpec("x", (ModelSpec(source),))


def origin(source: str, **settings: float) -> Check:
    found = spec(source)
    return doctor.check_origin(found, found.models[0], OriginSettings(**settings))


def test_kernels() -> None:
    assert doctor.check_kernel((6, 1)).outcome == "ok"
    assert doctor.check_kernel((4, 19)).outcome == "warn"


def test_transports() -> None:
    def outcome(wanted: str, running: str, refusal: str | None, binds: bool = False) -> str:
        return doctor.check_transport(wanted, running, refusal, binds=binds).outcome

    old, weak = "Linux 6.1 is older than 6.9", "it needs CAP_SYS_ADMIN"
    assert outcome("auto", "", None) == "ok"
    assert outcome("auto", "", weak) == "warn"
    assert outcome("auto", "", old, True) == "ok"
    assert "bind (Linux 6.1" in doctor.check_transport("auto", "", old, binds=True).found
    assert outcome("passthrough", "", weak) == "fail"
    assert outcome("passthrough", "", old, True) == "fail"
    assert outcome("bind", "", None, True) == "ok"
    assert outcome("bind", "", None) == "fail"
    assert outcome("pyfuse3", "", weak) == "ok"
    assert outcome("auto", "passthrough", None) == "ok"
    assert outcome("auto", f"bind ({old})", old, True) == "ok"
    assert outcome("auto", f"pyfuse3 ({weak}; no binds: they need CAP_SYS_ADMIN)", weak) == "warn"


def test_the_fuse_device(tmp_path: Path) -> None:
    assert doctor.check_fuse_device("/dev/null").outcome == "ok"
    missing = doctor.check_fuse_device(str(tmp_path / "fuse"))
    assert (missing.outcome, "modprobe fuse" in missing.advice) == ("fail", True)


def test_privileges() -> None:
    assert doctor.check_privileges(root=True, sys_admin=True).outcome == "ok"
    capless = doctor.check_privileges(root=True, sys_admin=False)
    assert (capless.outcome, "--cap-add SYS_ADMIN" in capless.advice) == ("fail", True)


def test_privileges_of_ordinary_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/fusermount3")
    assert doctor.check_privileges(root=False, sys_admin=False, allow_other=True).outcome == "ok"
    alone = doctor.check_privileges(root=False, sys_admin=False, allow_other=False)
    assert (alone.outcome, "user_allow_other" in alone.advice) == ("warn", True)
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert doctor.check_privileges(root=False, sys_admin=False, allow_other=True).outcome == "fail"


def test_a_password_in_the_hubs_endpoint_is_not_shown() -> None:
    found = doctor.check_hub("http://me:PlantedPassword@127.0.0.1:9", [])
    assert found.outcome == "warn" and "http://127.0.0.1:9" in found.found and "PlantedPassword" not in repr(found)
    found = doctor.check_hub("http://me:Planted/Password@127.0.0.1:9", [])
    assert found.outcome == "warn" and "Planted" not in repr(found)


@pytest.mark.parametrize("proxy", ["http://me:Planted/Password@127.0.0.1:9", "Planted:Password@127.0.0.1:no"])
def test_a_proxy_that_can_be_none_is_said_without_its_password(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", proxy)
    found = doctor.check_hub("http://hub.example", [])
    assert found.outcome == "warn" and "the proxy of HTTP_PROXY" in found.found and "Planted" not in repr(found)


def test_a_hub_that_speaks_no_http_is_a_warning() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def greet() -> None:
            with listener.accept()[0] as client:
                client.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
                client.recv(65536)

        thread = threading.Thread(target=greet)
        thread.start()
        found = doctor.check_hub(f"http://127.0.0.1:{listener.getsockname()[1]}", [])
        thread.join()
    assert found.outcome == "warn" and "SSH-2.0" in found.found


def test_a_hub_that_sends_doctor_on_is_not_followed() -> None:
    asked: list[tuple[str, str | None]] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["Authorization"]))
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{server.server_port}/elsewhere")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        found = doctor.check_hub(f"http://me:it'sSecret@127.0.0.1:{server.server_port}", skew := [])
        server.shutdown()
        thread.join()
    basic = "Basic " + base64.b64encode(b"me:it'sSecret").decode()
    assert found.outcome == "ok" and "Secret" not in found.found
    assert asked == [("/api/models?limit=1", basic)] and len(skew) == 1


def test_libfuse_and_clock() -> None:
    assert doctor.check_libfuse("3.14.0").outcome == "ok"
    assert doctor.check_libfuse(None).outcome == "fail"
    assert doctor.check_clock(None).outcome == "ok"
    assert doctor.check_clock(-1.0).outcome == "ok"
    behind = doctor.check_clock(-901.0)
    assert (behind.outcome, behind.found) == ("fail", "901 s behind")


def test_the_store_is_looked_at_where_it_will_be_made(config: Config, tmp_path: Path) -> None:
    found = list(doctor.check_store(config))
    assert [check.name for check in found] == ["store", "xattrs", "space"]
    assert all(check.outcome in ("ok", "warn") for check in found)
    assert f"will be made in {tmp_path}" in found[0].found
    assert not (tmp_path / "deep").exists()


def test_a_store_that_cannot_be() -> None:
    (found,) = doctor.check_store(Config(MountConfig("/x"), StoreConfig("/proc/store")))
    assert (found.outcome, "ext4 or xfs" in found.found) == ("fail", True)


def test_mountpoints(config: Config, tmp_path: Path) -> None:
    assert doctor.check_mountpoint(config, False).outcome == "ok"
    (tmp_path / "models").mkdir()
    assert doctor.check_mountpoint(config, False).outcome == "ok"
    assert doctor.check_mountpoint(config, True).outcome == "fail"
    (tmp_path / "models" / "file").touch()
    full = doctor.check_mountpoint(config, False)
    assert (full.outcome, "not empty" in full.found) == ("fail", True)
    other = Config(MountConfig("/proc"), config.store)
    assert "proc mount" in doctor.check_mountpoint(other, False).found


def test_no_daemon_is_a_warning(config: Config) -> None:
    check, specs, info = doctor.check_daemon(config, None)
    assert (check.outcome, specs, info) == ("warn", [], None)
    assert "instantstart start" in check.advice


def test_origins_that_answer_and_that_do_not(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert origin(f"file://{tmp_path}/model").outcome == "ok"
    missing = origin(f"file://{tmp_path}/none")
    assert (missing.outcome, "x: " in missing.found, missing.advice != "") == ("fail", True, True)


def test_an_origin_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ORIGIN_DEADLINE", 0.3)
    forever = threading.Event()

    class Silent:
        def check(self) -> None:
            forever.wait(30)

    monkeypatch.setattr(doctor, "open_origin", lambda *_: Silent())
    silent = origin("hf://o/r")
    forever.set()
    assert (silent.outcome, "no answer within 0.3 s" in silent.found) == ("fail", True)


def test_a_defect_in_an_origin_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(doctor, "open_origin", broken)
    assert "ZeroDivisionError" in origin("hf://o/r").found


def test_a_hub_that_is_away_or_silent_is_a_warning(monkeypatch: pytest.MonkeyPatch, black_hole: BlackHole) -> None:
    monkeypatch.setattr(doctor, "ORIGIN_DEADLINE", 0.5)
    for endpoint in ("http://127.0.0.1:1", black_hole.url, "nonsense"):
        skew: list[float] = []
        assert doctor.check_hub(endpoint, skew).outcome == "warn"
        assert skew == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    config = tmp_path / "config.toml"
    config.write_text(f'[pipelines.x]\nsource = "file://{tmp_path}/none"\n')
    arguments = ["doctor", "--config", str(config), "--store", str(tmp_path / "s"), "--mount", str(tmp_path / "m")]
    assert run([*arguments, "--json"]) == 1
    checks = json.loads(capsys.readouterr().out)
    assert {check["name"] for check in checks} >= {"config", "kernel", "fuse", "store", "space", "mount", "origin"}
    assert {tuple(check) for check in checks} == {("name", "outcome", "found", "advice")}
    assert run(arguments) == 1
    assert f"x: {tmp_path}/none" in capsys.readouterr().out
    config.write_text("[fill]\nnope = 1\n")
    assert run(arguments) == 1
    assert "fill.nope: unknown key" in capsys.readouterr().out


def test_the_region(tmp_path: Path) -> None:
    """Key, round trip and race; the advice says what to do."""
    key = tmp_path / "key"
    config = RegionalConfig(f"file://{tmp_path}/tier", str(key), "gpu-1")
    missing = doctor.check_region(config)
    assert (missing.outcome, f"{key}: No such file" in missing.found) == ("fail", True)
    key.write_text("ab" * 32)
    key.chmod(0o644)
    assert "chmod 600" in doctor.check_region(config).found
    key.chmod(0o600)
    unmounted = doctor.check_region(config)
    assert (unmounted.outcome, "is its share mounted?" in unmounted.found) == ("fail", True)
    (tmp_path / "tier").mkdir()
    good = doctor.check_region(config)
    assert (good.outcome, good.found) == (
        "ok",
        f"file://{tmp_path}/tier as gpu-1: reads, writes, and lets one writer win",
    )
    key.write_text("short")
    assert "openssl rand -hex 32" in doctor.check_region(config).found
    key.write_text("ab" * 32)
    dead = doctor.check_region(msgspec.structs.replace(config, url="s3://b", endpoint_url="http://127.0.0.1:1"))
    assert (dead.outcome, dead.advice) == ("fail", "files come from their origins until this is right")


def test_upstream_tiers_are_read_and_not_written(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("ab" * 32)
    key.chmod(0o600)
    for name in ("tier", "full", "empty"):
        (tmp_path / name).mkdir()
    DirectoryStore(str(tmp_path / "full")).put(*object_of(RegionKey(bytes.fromhex("ab" * 32)), HostRecord("h", b"")))
    before = sorted(tmp_path.rglob("*"))
    others = [f"file://{tmp_path}/{name}" for name in ("full", "empty", "missing")] + ["s3://b"]
    upstream = tuple(UpstreamConfig(url, endpoint_url="http://127.0.0.1:1") for url in others)
    config = RegionalConfig(f"file://{tmp_path}/tier", str(key), "gpu-1", upstream=upstream)
    found = list(doctor.check_upstream(config))
    assert [check.outcome for check in found] == ["ok", "ok", "fail", "fail"], found
    assert all(check.found.startswith(f"{url}: ") for check, url in zip(found, others, strict=True))
    assert "verifies with this key" in found[0].found and "is empty, so its key is not proven" in found[1].found
    assert "is its share mounted?" in found[2].found
    assert sorted(tmp_path.rglob("*")) == before


def put_seal(directory: Path, key: RegionKey, by: str = "there") -> None:
    slot, pin = "a" * 32, "b" * 32
    store, name = DirectoryStore(str(directory)), seal_name(slot, pin)
    store.put(chunk_name(slot, pin, 0), b"c" * 40)
    store.put(name, pack(key, "seal", name, Seal(8, 8, b"d" * 32, "size", by, 0.0)))


def test_the_key_of_a_tier_is_proven_by_what_is_sealed_there(tmp_path: Path) -> None:
    """One that is not the region's finds nothing that it may believe, and nobody would see why."""
    key, other = tmp_path / "key", tmp_path / "other"
    for path, digits in ((key, "ab"), (other, "cd")):
        path.write_text(digits * 32)
        path.chmod(0o600)
    for name in ("own", "far", "new"):
        (tmp_path / name).mkdir()
    for name in ("own", "far"):
        put_seal(tmp_path / name, RegionKey(bytes.fromhex("ab" * 32)))
    DirectoryStore(str(tmp_path / "new")).put("v1/probe/x", b"x")
    urls = {name: f"file://{tmp_path}/{name}" for name in ("own", "far", "new")}
    upstream = (
        UpstreamConfig(urls["far"], key_file=str(key)),
        UpstreamConfig(urls["far"]),
        UpstreamConfig(urls["new"]),
    )
    config = RegionalConfig(urls["own"], str(other), "gpu-1", upstream=upstream)
    right, wrong, new = doctor.check_upstream(config)
    assert (right.outcome, new.outcome) == ("ok", "ok") and "its key is not proven" in new.found
    assert (wrong.outcome, "none of 1 records" in wrong.found, "key_file" in wrong.advice) == ("fail", True, True)
    own = doctor.check_region(config)
    assert (own.outcome, "made with this key" in own.found) == ("warn", True)
    own = doctor.check_region(RegionalConfig(urls["own"], str(key), "gpu-1"))
    assert own.outcome == "ok", own


def test_a_hosts_own_records_do_not_prove_its_key(tmp_path: Path) -> None:
    """Its daemon runs with a wrong one: it has written a heartbeat, and sealed what it pulled, with that."""
    key, other = tmp_path / "key", tmp_path / "other"
    for path, digits in ((key, "ab"), (other, "cd")):
        path.write_text(digits * 32)
        path.chmod(0o600)
    tier = tmp_path / "tier"
    tier.mkdir()
    config = RegionalConfig(f"file://{tier}", str(other), "gpu-1")
    info = DaemonInfo("1", 1, "/models", "/store", 1.0, 0, True, tier=TierStatus("ok", None))
    right, wrong = (RegionKey(bytes.fromhex(digits * 32)) for digits in ("ab", "cd"))
    DirectoryStore(str(tier)).put(*object_of(wrong, HostRecord("gpu-1", b"")))
    put_seal(tier, wrong, by="gpu-1")
    assert doctor.check_region(config, info).outcome == "ok", "it is alone there"
    DirectoryStore(str(tier)).put(*object_of(right, HostRecord("gpu-2", b"")))
    found = doctor.check_region(config, info)
    assert (found.outcome, "none of 1 records" in found.found) == ("warn", True), found
    DirectoryStore(str(tier)).put(*object_of(wrong, HostRecord("gpu-3", b"")))
    assert doctor.check_region(config, info).outcome == "ok"


def test_forged_heartbeats_that_come_first_do_not_hide_a_key_that_is_right(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("ab" * 32)
    path.chmod(0o600)
    (tmp_path / "tier").mkdir()
    store, key = DirectoryStore(str(tmp_path / "tier")), RegionKey(bytes.fromhex("ab" * 32))
    for number in range(20):  # names that sort before all others
        store.put(f"v1/hosts/{number:032x}.{0:016x}", b"x" * 200)
        store.put(f"v1/{number:032x}/{0:032x}/seal", b"x" * 200)
    for number in range(4):
        store.put(*object_of(key, HostRecord(f"gpu-{number + 2}", b"")))
    own = key.host("gpu-1")
    store.put(f"v1/hosts/{own}.{0:016x}", b"x" * 200)  # and no host of this one's name
    config = RegionalConfig(f"file://{tmp_path}/tier", str(path), "gpu-1")
    found = doctor.check_region(config)
    assert found.outcome == "ok", found


def test_two_hosts_of_one_name_are_found(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("ab" * 32)
    key.chmod(0o600)
    (tmp_path / "tier").mkdir()
    config = RegionalConfig(f"file://{tmp_path}/tier", str(key), "gpu-1")
    info = DaemonInfo("1", 1, "/models", "/store", 1.0, 0, True, tier=TierStatus("ok", None))
    DirectoryStore(str(tmp_path / "tier")).put(
        *object_of(RegionKey(bytes.fromhex("ab" * 32)), HostRecord("gpu-1", b""))
    )
    assert doctor.check_region(config, info).outcome == "ok", "that is its daemon's"
    before = doctor.check_region(config)
    assert (before.outcome, "a host of this name was heard of" in before.found) == ("warn", True)
    assert doctor.check_region(msgspec.structs.replace(config, host="gpu-2")).outcome == "ok"
    warned = msgspec.structs.replace(info, tier=TierStatus("ok", None, warning="another host calls itself gpu-1"))
    found = doctor.check_region(config, warned)
    assert (found.outcome, "another host calls itself gpu-1" in found.found) == ("warn", True)


def test_an_engine_that_lets_several_writers_win_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DirectoryStore, "put_new", lambda *_: True)
    key = tmp_path / "key"
    key.write_text("ab" * 32)
    key.chmod(0o600)
    (tmp_path / "tier").mkdir()
    found = doctor.check_region(RegionalConfig(f"file://{tmp_path}/tier", str(key), "gpu-1"))
    assert (found.outcome, "of 8 writers of one new object 8 won" in found.found) == ("warn", True)


def test_the_apis_token_is_looked_at(tmp_path: Path) -> None:
    token = tmp_path / "token"
    assert doctor.check_api(str(token), True).outcome == "fail"
    token.touch(0o600)
    token.write_text("short")
    assert "less than 16 characters" in doctor.check_api(str(token), True).found
    token.write_text("long-enough-to-be-one")
    assert doctor.check_api(str(token), True).outcome == "ok"
    assert doctor.check_api(str(token), False).outcome == "warn"
    token.chmod(0o644)
    assert doctor.check_api(str(token), True).outcome == "fail"
