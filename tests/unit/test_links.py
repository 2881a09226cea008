"""What `mount` puts at DIR, and where a user's daemon keeps its things, while others move files about."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from instantstart_fs.cli import links, own_daemon
from instantstart_fs.config import places
from instantstart_fs.errors import DaemonUnreachable, InstantStartError, PermissionRefused, UsageError


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A pipeline's directory below a mount that counts as ours."""
    found = tmp_path / "models" / "m"
    found.mkdir(parents=True)
    monkeypatch.setattr(links, "default_mount", lambda: str(found.parent))
    yield found


def checked(path: Path) -> links.Place:
    place = links.Place(str(path))
    place.check_free()
    return place


def test_what_may_become_a_link_does(tmp_path: Path, target: Path) -> None:
    here, empty, old = tmp_path / "here", tmp_path / "empty", tmp_path / "old"
    empty.mkdir()
    old.symlink_to(target.parent / "another")
    for path in (here, empty, old):
        with checked(path) as place:
            place.link(str(target))
        assert os.readlink(path) == str(target)
    assert sorted(os.listdir(tmp_path)) == ["empty", "here", "models", "old"]


@pytest.mark.parametrize("before", ["nothing", "directory", "link"])
def test_what_came_to_dir_meanwhile_is_not_lost(tmp_path: Path, target: Path, before: str) -> None:
    """A daemon's start and an add lie between the check and the link: minutes."""
    here = tmp_path / "here"
    if before == "directory":
        here.mkdir()
    if before == "link":
        here.symlink_to(target.parent / "another")
    with checked(here) as place:
        if before == "directory":
            (here / "file").write_text("precious")
        else:
            here.unlink(missing_ok=True)
            here.write_text("precious")
        with pytest.raises(UsageError):
            place.link(str(target))
    assert (here / "file" if before == "directory" else here).read_text() == "precious"


def test_a_link_is_made_in_the_directory_that_was_checked(tmp_path: Path, target: Path) -> None:
    """Root's `mount` in another user's directory: its owner puts a link to another one in its place."""
    theirs, etc = tmp_path / "theirs", tmp_path / "etc"
    theirs.mkdir()
    etc.mkdir()
    (etc / "passwd").symlink_to(target.parent / "another")
    with checked(theirs / "passwd") as place:
        theirs.rename(tmp_path / "moved")
        theirs.symlink_to(etc)
        place.link(str(target))
    assert os.readlink(tmp_path / "moved" / "passwd") == str(target)
    assert os.readlink(etc / "passwd") == str(target.parent / "another")
    with pytest.raises(UsageError, match="mounted at"):
        links.Place("/")


def test_to_forget_a_pipeline_the_link_must_lead_to_the_daemon_that_is_asked(tmp_path: Path, target: Path) -> None:
    (tmp_path / "here").symlink_to(target)
    with links.Place(str(tmp_path / "here")) as place:
        with pytest.raises(UsageError, match="not the one that shows this"):
            place.pipeline("/srv/other/models", only=True)
        assert place.pipeline(str(target.parent), only=True) == "m"
        assert place.unlink("/srv/other/models") == "m", "without --forget nothing but the link goes"


@pytest.mark.parametrize("error", [PermissionRefused("no"), DaemonUnreachable("none")])
def test_a_socket_that_is_not_for_this_user_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, error: InstantStartError
) -> None:
    """Refused on the way to the socket, and by the daemon behind it."""

    def refuse(path: str) -> None:
        raise error

    monkeypatch.delenv("INSTANTSTART_SOCKET", raising=False)
    monkeypatch.setattr(own_daemon, "Client", refuse)
    assert own_daemon._running(None) is None

    class Answering:
        closed = 0

        def __init__(self, path: str) -> None:
            self.path = path

        def specs(self) -> Any:
            raise error

        def close(self) -> None:
            Answering.closed += 1

    monkeypatch.setattr(own_daemon, "Client", Answering)
    assert own_daemon._running(None) is None and Answering.closed == 2
    monkeypatch.setattr(own_daemon, "Client", refuse)
    if isinstance(error, PermissionRefused):
        with pytest.raises(PermissionRefused):
            own_daemon._running("/named")


def test_a_directory_where_others_write_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, cache, user = tmp_path / "runtime", tmp_path / "cache", os.getuid() or 1000
    runtime.mkdir(mode=0o700)
    os.chown(runtime, user, -1)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert places.run_directory() == str(runtime / "instantstart")
    assert own_daemon._kept(str(runtime / "x.sock"), "daemon.log") == str(runtime / "daemon.log")
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert places.run_directory() == str(cache / "instantstart"), "`su` that keeps the variable"
    monkeypatch.setattr(os, "geteuid", lambda: user)
    runtime.chmod(0o1777)
    assert places.run_directory() == str(cache / "instantstart"), "/tmp"
    kept = [own_daemon._kept(str(runtime / name), "daemon.log") for name in ("x.sock", "y.sock", "x.sock")]
    assert kept[0] == kept[2] != kept[1] and all(path.startswith(str(cache / "instantstart")) for path in kept)


def test_a_daemon_that_others_found_is_known(tmp_path: Path) -> None:
    socket = str(tmp_path / "control.sock")
    own_daemon._note_use(socket)
    assert not os.listdir(tmp_path), "not one that `mount` started: nothing is left beside its socket"
    (tmp_path / "daemon.log").touch()
    assert not own_daemon.is_used_by_others(socket)
    own_daemon._note_use(socket)
    assert own_daemon.is_used_by_others(socket)


def test_to_stop_a_daemon_that_has_ended_is_no_error() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()

    class Ended:
        ended = True

        def peer_pid(self) -> int:
            return gone.pid

        def wait_ended(self, timeout: float) -> bool:
            return self.ended

    own_daemon.stop(Ended())  # type: ignore[arg-type]
    Ended.ended = False
    with pytest.raises(InstantStartError, match="not to be found"):
        own_daemon.stop(Ended())  # type: ignore[arg-type]
