"""Directories that others have to pass, made by several hands in any order and under any umask."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from instantstart_fs.config import places
from instantstart_fs.config.directories import make_directory, obstacle


@pytest.fixture(params=[0o022, 0o077, 0o777], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


def test_all_that_is_made_has_the_modes_that_were_meant(tmp_path: Path, umask: int) -> None:
    make_directory(str(tmp_path / "a" / "b" / "c"))
    make_directory(str(tmp_path / "a" / "private"), 0o700)
    assert [mode(tmp_path / name) for name in ("a", "a/b", "a/b/c", "a/private")] == [0o755, 0o755, 0o755, 0o700]


def test_what_is_there_stays_as_it_is(tmp_path: Path, umask: int) -> None:
    tmp_path.joinpath("there").mkdir()
    tmp_path.joinpath("there").chmod(0o750)
    make_directory(str(tmp_path / "there"))
    assert mode(tmp_path / "there") == 0o750
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        make_directory(str(tmp_path / "file"))


@pytest.mark.skipif(os.geteuid() != 0, reason="the run directory of root")
def test_the_run_directory_is_passable_whoever_made_it_first(
    tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`prefetch --hold` under a umask of 077, or an earlier release's daemon. What systemd made is the unit's."""
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    run = tmp_path / "run"
    monkeypatch.setattr(places, "SYSTEM_RUN_DIRECTORY", str(run))
    run.mkdir()
    run.chmod(0o700)
    monkeypatch.setenv("RUNTIME_DIRECTORY", f"/run/other:{run}")
    places.make_run_directory(str(run))
    assert mode(run) == 0o700, "the unit's own choice"
    monkeypatch.delenv("RUNTIME_DIRECTORY")
    places.make_run_directory(str(run))
    assert mode(run) == 0o755
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    elsewhere.chmod(0o700)
    places.make_run_directory(str(elsewhere))
    assert mode(elsewhere) == 0o700, "whoever names another directory has chosen its modes"


def test_the_first_obstacle_is_named(tmp_path: Path) -> None:
    inner = tmp_path / "closed" / "open"
    inner.mkdir(parents=True)
    inner.parent.chmod(0o750)
    found = obstacle(str(inner))
    assert found is not None and (found == str(inner.parent) or str(inner.parent).startswith(found))
    assert obstacle("/usr/bin") is None
