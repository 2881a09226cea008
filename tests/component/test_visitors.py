"""Who is at the other end of a connection to the page, with real sockets, uids and network namespaces."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from instantstart_fs.config import HttpConfig
from instantstart_fs.core.sight import ANYBODY
from instantstart_fs.web import tcppeer
from instantstart_fs.web.tcppeer import uid_of, uid_of_peer
from tests.component.site import Served, fill_with_examples, serving

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="acts as other users")
HIDDEN = "voice-agent"
TOKEN = "a-token-of-this-test-0123456789"


@contextlib.contextmanager
def connected(family: int, host: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends: the one that was accepted, and the client's."""
    with (
        socket.create_server((host, 0), family=family) as listener,
        socket.create_connection(listener.getsockname()[:2]) as client,
    ):
        accepted, _ = listener.accept()
        with accepted:
            yield accepted, client


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_the_uid_of_a_local_connection_is_known_while_it_is_open(family: int, host: str) -> None:
    try:
        with connected(family, host) as (ours, theirs):
            assert uid_of_peer(ours) == os.geteuid()
            theirs.shutdown(socket.SHUT_WR)  # it has said all that it will, and still reads
            assert uid_of_peer(ours) == os.geteuid()
            theirs.close()
            # The kernel's own word for a socket that nobody has is uid 0.
            assert uid_of_peer(ours) is None
    except OSError:
        pytest.skip(f"no {host} here")


def test_a_socket_of_both_families_knows_an_ipv4_caller() -> None:
    with (
        socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener,
        socket.create_connection(("127.0.0.1", listener.getsockname()[1])),
    ):
        accepted, address = listener.accept()
        with accepted:
            assert address[0] == "::ffff:127.0.0.1" and uid_of_peer(accepted) == os.geteuid()


@pytest.mark.parametrize("listening", ["127.0.0.1", "::"])
def test_an_ipv4_caller_with_a_socket_of_both_families_is_known(listening: str) -> None:
    """As Java makes them all."""
    family = socket.AF_INET6 if ":" in listening else socket.AF_INET
    with (
        socket.create_server((listening, 0), family=family, dualstack_ipv6=family == socket.AF_INET6) as listener,
        socket.socket(socket.AF_INET6) as client,
    ):
        client.connect(("::ffff:127.0.0.1", listener.getsockname()[1]))
        accepted, _ = listener.accept()
        with accepted:
            assert uid_of_peer(accepted) == os.geteuid()
            assert uid_of(("127.0.0.2", client.getsockname()[1]), ("127.0.0.1", listener.getsockname()[1])) is None
            client.close()
            assert uid_of_peer(accepted) is None


def test_neither_a_listener_nor_another_connection_is_taken_for_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, connected(socket.AF_INET, "127.0.0.1") as (ours, _):
        assert uid_of(other.getsockname(), ours.getsockname()) is None
        assert uid_of(("192.0.2.1", 4242), ours.getsockname()) is None
        assert uid_of(("127.0.0.1", 1), ours.getsockname()) is None
        assert uid_of(("::1", 1), ours.getsockname()) is None


@root_only
def test_a_user_of_another_user_namespace_is_nobody_in_particular(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel calls it 65534, and a real user may have that number."""
    monkeypatch.setattr(tcppeer, "_overflow_uid", lambda: os.geteuid())
    with connected(socket.AF_INET, "127.0.0.1") as (ours, _):
        assert uid_of_peer(ours) is None


# -- the page ------------------------------------------------------------------------------------------------------


def as_user(uid: int, url: str, *more: str) -> tuple[int, str]:
    """Status and text of what that user is answered."""
    code = (
        "import sys, urllib.error, urllib.request\n"
        "request = urllib.request.Request(sys.argv[1], headers=dict(h.split(': ', 1) for h in sys.argv[2:]))\n"
        "try:\n    answer = urllib.request.urlopen(request, timeout=20)\n"
        "except urllib.error.HTTPError as error:\n    answer = error\n"
        "print(answer.status)\nprint(answer.read(200000).decode())"
    )
    command = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", sys.executable, "-c", code, url, *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    status, _, text = done.stdout.partition("\n")
    return int(status), text


@contextlib.contextmanager
def site(**config: object) -> Iterator[Served]:
    """Root sees everything, others all but HIDDEN."""
    with serving(HttpConfig(port=0, **config), sight=ANYBODY, uids=True) as served:  # type: ignore[arg-type]
        fill_with_examples(served.library)
        served.library.pipelines.hidden.add(HIDDEN)
        yield served


PATHS = ("", "?q=voice", "?state=filling", "api/pipelines", "api/pipelines?state=filling", "metrics", "healthz")


@root_only
def test_a_stranger_is_told_nothing_of_a_hidden_pipeline_on_any_way() -> None:
    with site() as served:
        for path in PATHS:
            status, text = as_user(54321, served.url + path)
            assert status == 200 and HIDDEN not in text.replace('value="voice"', ""), path
            assert "6.2 GB" not in text and "62 %" not in text, "its bytes"
        shown = json.loads(as_user(54321, served.url + "api/pipelines")[1])
        assert shown["states"]["filling"] == 0 and shown["total"] == len(served.library.pipelines) - 1
        assert shown["store"] is None and all(start["pipeline"] != HIDDEN for start in shown["cold_starts"])
        # What is hidden and what is not there: one answer.
        for way in ("badge/{}.svg", "api/cold-starts/{}"):
            hidden, absent = (as_user(54321, served.url + way.format(name)) for name in (HIDDEN, "no-such"))
            assert hidden == absent and hidden[0] == 404
        metrics = as_user(54321, served.url + "metrics")[1]
        assert 'instantstart_pipelines{state="filling"} 0.0' in metrics and 'pipeline="flux-dev"' in metrics
        assert not any(word in metrics for word in ("fetched_bytes", "store_used", "cold_starts_total", "origin="))


@root_only
def test_root_sees_all_of_it_and_a_live_page_shows_each_his_own() -> None:
    with site() as served:
        for path in ("", "api/pipelines", "metrics"):
            with urllib.request.urlopen(served.url + path, timeout=20) as answer:
                assert HIDDEN in answer.read().decode()
        with urllib.request.urlopen(served.url + f"badge/{HIDDEN}.svg", timeout=20) as answer:
            assert b"filling" in answer.read()
        code = "import sys, urllib.request as u\nprint(u.urlopen(sys.argv[1], timeout=20).read(6000).decode())"
        command = ["setpriv", "--reuid=54321", "--clear-groups", sys.executable, "-c", code, served.url + "api/events"]
        told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        assert "flux-dev" in told and HIDDEN not in told


@pytest.mark.parametrize(
    "header",
    [
        "X-Forwarded-For: 10.0.0.1",
        "x-forwarded-proto: http",
        "X-Envoy-Expected-Rq-Timeout-Ms: 15000",
        "CF-Connecting-IP: 10.0.0.1",
        "Forwarded: for=10.0.0.1",
        "Via: 1.1 nginx",
        "Sec-Fetch-Site: cross-site",
    ],
)
def test_who_asks_for_somebody_else_is_not_taken_for_himself(header: str) -> None:
    """A proxy that runs as root would hand out what root sees; and so would root's browser, to any web page."""
    with site() as served:
        name, _, value = header.partition(": ")
        request = urllib.request.Request(served.url + "api/pipelines", headers={name: value})
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert HIDDEN not in answer.read().decode()


def test_with_the_token_everything_is_seen_and_with_a_wrong_one_nothing(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.touch(0o600)
    file.write_text(TOKEN + "\n")

    def ask(token: str) -> tuple[int, str]:
        headers = {"Authorization": f"Bearer {token}", "X-Forwarded-For": "10.0.0.1"}
        request = urllib.request.Request(served.url + "metrics", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    with site(token_file=str(file)) as served:
        assert ask(TOKEN)[0] == 200 and HIDDEN in ask(TOKEN)[1]
        for wrong in ("", "x", TOKEN + "x", TOKEN[:-1], "ünï"):
            assert ask(wrong)[0] == 401
        file.write_text("another-token-0123456789\n")  # exchanged: no restart
        os.utime(file, (time.time() + 5, time.time() + 5))
        assert ask(TOKEN)[0] == 401 and ask("another-token-0123456789")[0] == 200
        file.chmod(0o644)
        assert ask("another-token-0123456789")[0] == 401, "whoever could read it may have it"
        file.chmod(0o600)
        file.write_text("short\n")
        assert ask("short")[0] == 401
        file.unlink()
        assert ask("another-token-0123456789")[0] == 401


@root_only
def test_where_the_operator_has_opened_it_everybody_sees_everything() -> None:
    with site(public=True) as served:
        assert HIDDEN in as_user(54321, served.url)[1]
        assert HIDDEN in as_user(54321, served.url + "metrics", "X-Forwarded-For: 10.0.0.1")[1]
