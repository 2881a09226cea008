"""The life of a mount: made where it may be, tuned, ready when it says so, cleared after a kill, always taken down."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import trio

from instantstart_fs.errors import MountFailed
from instantstart_fs.mount import kernel, pyfuse3_transport
from instantstart_fs.mount.mountpoint import may_allow_other, prepare_mountpoint
from instantstart_fs.mount.operations import STABLE_NEGATIVE_TIMEOUT
from instantstart_fs.mount.session import serve
from instantstart_fs.mount.transport import Mounted, MountSettings
from instantstart_fs.system import mountinfo
from instantstart_fs.vfs import ROOT, Invalidation
from tests.fuse.conftest import Readers, StartDaemon, command, python, wait_for
from tests.fuse.fake_view import FakeView


def _prepare(path: Path, **settings: str) -> str:
    return prepare_mountpoint(MountSettings(path=str(path), **settings))


def test_ready_means_that_it_answers(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    mount = mountinfo.find_mount(str(daemon.path))
    assert mount is not None
    assert mount.filesystem == "fuse.instantstart"
    assert mount.source == "instantstart"
    assert {"ro", "default_permissions", "allow_other", "nosuid", "nodev"} <= set(mount.options.split(","))
    assert command("ls", str(daemon.path), timeout=5).stdout.split() == ["live", "many", "model"]


def test_the_mount_is_tuned(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    mount = mountinfo.find_mount(str(daemon.path))
    assert mount is not None
    assert Path(f"/sys/class/bdi/{mount.device}/read_ahead_kb").read_text().strip() == "1024"
    minor = mount.device.split(":")[1]
    for name in ("max_background", "congestion_threshold"):
        assert Path(f"{kernel.FUSECTL}/{minor}/{name}").read_text().strip() == str(MountSettings("/m").max_background)


def test_sigterm_leaves_no_mount(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    assert daemon.terminate() == 0
    assert mountinfo.find_mount(str(daemon.path)) is None
    assert os.listdir(daemon.path) == []
    assert "Traceback" not in daemon.log()


@pytest.mark.parametrize("way", ["os.read(fd, 10)", "mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)[0]",
                                 "os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM); os.read(fd, 10)"])  # fmt: skip
@pytest.mark.alone
def test_sigterm_ends_soon_with_readers_stuck(start_daemon: StartDaemon, readers: Readers, way: str) -> None:
    daemon = start_daemon()
    stuck = [
        readers.start(
            f"import mmap, os, sys; fd = os.open(sys.argv[1], os.O_RDONLY); {way}", str(daemon.path / f"model/stuck{i}")
        )
        for i in range(4)
    ]
    daemon.wait_stuck(4)
    started = time.monotonic()
    assert daemon.terminate() == 0
    assert time.monotonic() - started < 5
    assert mountinfo.find_mount(str(daemon.path)) is None
    for reader in stuck:
        assert reader.wait(10) in (1, -signal.SIGBUS)


def test_an_unmount_by_somebody_else_ends_it(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    kernel.umount_lazily(str(daemon.path))
    wait_for(lambda: "unmounted by somebody else" in daemon.log(), 10)
    assert daemon.terminate() == 0


def test_the_mount_of_a_killed_daemon_is_cleared(start_daemon: StartDaemon) -> None:
    first = start_daemon()
    command("ls", "-lR", str(first.path / "model"))
    first.kill()
    assert mountinfo.find_mount(str(first.path)) is not None
    second = start_daemon()
    assert "clearing the mount that a killed daemon left" in second.log()
    assert command("ls", str(second.path), timeout=5).stdout.split() == ["live", "many", "model"]
    assert second.terminate() == 0
    assert mountinfo.find_mount(str(first.path)) is None


def test_a_mount_whose_daemon_was_killed_under_a_stuck_reader_is_cleared(
    start_daemon: StartDaemon, readers: Readers
) -> None:
    first = start_daemon()
    readers.start("import sys; open(sys.argv[1], 'rb').read(10)", str(first.path / "model/stuck"))
    first.wait_stuck(1)
    first.kill()
    assert start_daemon().terminate() == 0


def test_a_live_mount_is_left_alone(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    with pytest.raises(MountFailed, match="served by another instantstart daemon"):
        _prepare(daemon.path)
    second = start_daemon(ready=False)
    assert second.process.wait(20) == 1
    assert "served by another instantstart daemon" in second.log()
    assert command("ls", str(daemon.path), timeout=5).stdout.split() == ["live", "many", "model"]


def test_a_daemon_that_does_not_answer_is_left_alone(start_daemon: StartDaemon) -> None:
    """It may be stopped in a debugger: its mount is not dead, and the newcomer says so instead of waiting."""
    daemon = start_daemon()
    daemon.process.send_signal(signal.SIGSTOP)
    second = start_daemon(ready=False)
    try:
        second.process.wait(40)
    finally:
        daemon.process.send_signal(signal.SIGCONT)
    assert "did not answer within" in second.log()
    assert command("ls", str(daemon.path), timeout=5).stdout.split() == ["live", "many", "model"]


def test_something_else_that_is_mounted_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "mnt"
    path.mkdir()
    assert command("mount", "-t", "tmpfs", "tmpfs", str(path)).returncode == 0
    try:
        with pytest.raises(MountFailed, match="already has a tmpfs filesystem"):
            _prepare(path)
    finally:
        kernel.umount_lazily(str(path))


def test_mountpoints_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(MountFailed, match="not a directory"):
        _prepare(tmp_path / "file")
    with pytest.raises(MountFailed, match=r"cannot be used: Not a directory"):
        _prepare(tmp_path / "file" / "below")
    with pytest.raises(MountFailed, match=r"is not empty \(it holds 'file'\); empty it"):
        _prepare(tmp_path)
    for mountpoint, store in (("store/mnt", "store"), ("mnt", "mnt/store"), ("same", "same")):
        with pytest.raises(MountFailed, match="may not lie in one another"):
            _prepare(tmp_path / mountpoint, store=str(tmp_path / store))
    assert not (tmp_path / "mnt").exists()


def test_a_mountpoint_is_made_and_its_real_path_is_used(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real").mkdir()
    assert _prepare(tmp_path / "link" / "a" / "b") == str(tmp_path / "real" / "a" / "b")
    (tmp_path / "empty").mkdir()
    (tmp_path / "last").symlink_to(tmp_path / "empty")
    assert _prepare(tmp_path / "last") == str(tmp_path / "empty")


async def _mount_once(path: Path, transport: Any) -> None:
    view = FakeView()
    directory = view.add(ROOT, "d", "dir")
    async with trio.open_nursery() as nursery:
        mounted: Mounted = await nursery.start(serve, view, MountSettings(path=str(path), transport=transport))
        assert mounted.transport == transport
        assert mounted.path == str(path)
        assert await _exists(path / "d" / "later") == "False"
        with pytest.raises(MountFailed, match="serves a mount already"):
            await serve(view, MountSettings(path=str(path / "other")))
        view.add(directory, "later")
        for name in ("later", "never-known"):
            view.invalidate(Invalidation(parent=directory, name=name))
        view.invalidate(Invalidation(parent=ROOT, name=None, nodeid=987_654))
        with trio.fail_after(STABLE_NEGATIVE_TIMEOUT - 2):
            while await _exists(path / "d" / "later") == "False":
                pass
        nursery.cancel_scope.cancel()


async def _exists(path: Path) -> str:
    code = "import os, sys; print(os.path.exists(sys.argv[1]))"
    return await trio.to_thread.run_sync(python, code, str(path), abandon_on_cancel=True)


async def test_one_process_may_mount_again(tmp_path: Path, transport: str) -> None:
    for _ in range(3):
        with trio.fail_after(20):
            await _mount_once(tmp_path / "mnt", transport)
        assert mountinfo.find_mount(str(tmp_path / "mnt")) is None


async def test_where_the_store_cannot_be_passed_through_auto_serves_with_pyfuse3(tmp_path: Path) -> None:
    """Found out on a mount of its own, which is taken down again. /proc takes neither a file nor passthrough."""
    if kernel.why_no_passthrough() is not None:
        pytest.skip("no FUSE passthrough here")
    path = tmp_path / "mnt"
    with trio.fail_after(20), pytest.raises(MountFailed, match="FUSE passthrough to /proc"):
        await serve(FakeView(), MountSettings(path=str(path), store="/proc", transport="passthrough"))
    assert mountinfo.find_mount(str(path)) is None
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            mounted: Mounted = await nursery.start(serve, FakeView(), MountSettings(path=str(path), store="/proc"))
            assert mounted.transport == "pyfuse3"
            assert "FUSE passthrough to /proc" in mounted.reason
            nursery.cancel_scope.cancel()
    assert mountinfo.find_mount(str(path)) is None


async def test_where_kernel_or_capability_lack_auto_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "why_no_passthrough", lambda: "Linux 6.1 is older than 6.9")
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            mounted: Mounted = await nursery.start(serve, FakeView(), MountSettings(path=str(tmp_path / "mnt")))
            assert (mounted.transport, "6.1" in mounted.reason) == ("pyfuse3", True)
            nursery.cancel_scope.cancel()


async def test_a_mount_that_fails_says_so_and_leaves_the_process_able_to(tmp_path: Path, transport: Any) -> None:
    settings = MountSettings(path=str(tmp_path / "mnt"), subtype="with,comma=1", transport=transport)
    with trio.fail_after(20), pytest.raises(MountFailed, match="cannot mount at"):
        await serve(FakeView(), settings)
    with trio.fail_after(20):
        await _mount_once(tmp_path / "mnt", transport)


@pytest.mark.parametrize("transport", ["pyfuse3"], indirect=True)
def test_a_withdrawn_request_does_not_block_the_daemon(start_daemon: StartDaemon) -> None:
    """A reader killed between pyfuse3's poll and its read leaves a descriptor that is readable no more."""
    daemon = start_daemon()
    for round_number in range(3):
        assert daemon.ask("false-alarm") == "ok"
        assert command("stat", str(daemon.path / f"many/file-{round_number:05}"), timeout=5).returncode == 0
        wait_for(lambda: daemon.ask("false-alarms") == "0", 5)  # it came, and the loop still turns
    assert command("ls", str(daemon.path), timeout=5).returncode == 0
    assert daemon.terminate() == 0


@pytest.mark.parametrize("transport", ["pyfuse3"], indirect=True)
def test_an_ordinary_user_may_mount(start_daemon: StartDaemon) -> None:
    """By fusermount3: untuned and for that user alone, which is noted. A killed one's stale mount is cleared too."""
    setpriv = shutil.which("setpriv")
    if setpriv is None or shutil.which("fusermount3") is None:
        pytest.skip("needs setpriv and fusermount3")
    if os.stat("/dev/fuse").st_mode & 0o006 != 0o006:
        pytest.skip("ordinary users may not open /dev/fuse here")
    prefix = (setpriv, "--reuid=65534", "--regid=65534", "--clear-groups")
    if command(*prefix, sys.executable, "-c", "import pyfuse3").returncode != 0:
        pytest.skip("an ordinary user cannot run this interpreter (it lies in a private directory)")
    with tempfile.TemporaryDirectory() as home:  # pytest's own directories are private to root
        os.chown(home, 65534, 65534)
        daemon = start_daemon(path=Path(home) / "mnt", prefix=prefix)
        assert "readahead of the mount stays at the kernel's default" in daemon.log()
        assert command(*prefix, "ls", str(daemon.path)).stdout.split() == ["live", "many", "model"]
        daemon.kill()
        second = start_daemon(path=Path(home) / "mnt", prefix=prefix)
        assert "clearing the mount that a killed daemon left" in second.log()
        assert second.terminate() == 0
        assert mountinfo.find_mount(str(daemon.path)) is None


def test_allow_other_is_given_up_with_a_note(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(kernel, "user_allow_other", lambda: False)
    assert not may_allow_other(MountSettings(path="/x"))
    assert "user_allow_other" in caplog.text
    monkeypatch.setattr(kernel, "user_allow_other", lambda: True)
    assert may_allow_other(MountSettings(path="/x"))


def test_mountinfo_with_spaces_and_stacked_mounts() -> None:
    text = (
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        "40 22 0:39 / /mnt/a\\040b ro,nosuid shared:2 master:3 - fuse.instantstart instantstart rw,user_id=0\n"
        "41 22 0:40 / /mnt/a\\040b rw - tmpfs none rw\n"
    )
    found = mountinfo.parse_mountinfo(text)
    assert [mount.path for mount in found] == ["/", "/mnt/a b", "/mnt/a b"]
    assert found[1].filesystem == "fuse.instantstart"
    assert found[1].device == "0:39"
    assert found[1].options == "ro,nosuid,rw,user_id=0"


def test_facts_for_the_doctor() -> None:
    assert kernel.kernel_release() >= (4, 0)
    version = kernel.libfuse_version()
    assert version is not None
    assert version.startswith("3.")
    assert not kernel.user_allow_other("#user_allow_other\n")
    assert kernel.user_allow_other("mount_max = 5\n user_allow_other \n")


def test_who_may_not_open_the_device_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != "/dev/fuse")
    assert "may not open /dev/fuse: as root, chmod 666" in pyfuse3_transport.why_not_mounted()
    monkeypatch.setattr(os.path, "exists", lambda path: path != "/dev/fuse")
    assert "modprobe fuse" in pyfuse3_transport.why_not_mounted()
