"""What the probe for GPUDirect Storage says of a machine, by its library, its configuration and its driver."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from instantstart_fs.prefetch.backends import gds
from instantstart_fs.prefetch.backends.base import Backend, Item
from instantstart_fs.prefetch.backends.gds import Gds, GdsProbe, probe
from tests.harness import random_file


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GPU, a torch with cuFile, no driver for it, no configuration: ``cufile.json`` and ``nvidia-fs`` may be made."""
    torch = SimpleNamespace(
        __version__="2", cuda=SimpleNamespace(is_available=lambda: True), _C=SimpleNamespace(_gds_register_handle=len)
    )
    monkeypatch.setattr(gds, "load_torch", lambda: torch)
    monkeypatch.setattr(gds, "NVIDIA_FS", str(tmp_path / "nvidia-fs"))
    monkeypatch.setenv("CUFILE_ENV_PATH_JSON", str(tmp_path / "cufile.json"))
    return tmp_path


def nobody(reason: str) -> Backend:
    raise AssertionError(reason)


def refused(found: GdsProbe) -> str | None:
    assert Gds("cuda:0", nobody).refusal() == (None if found.usable and found.native else found.reason)
    return Gds("cuda:0", nobody).refusal()


def test_a_silent_compatibility_mode_is_reported_and_refused(machine: Path) -> None:
    found = probe()
    assert (found.usable, found.native) == (True, False)
    assert "silently use its compatibility mode" in (refused(found) or "")


def test_the_driver_makes_it_native(machine: Path) -> None:
    (machine / "nvidia-fs").mkdir()
    assert refused(probe()) is None


def test_peer_to_peer_makes_it_native_without_the_driver(machine: Path) -> None:
    """As NVIDIA ships the file: with comments, and commas at the end."""
    (machine / "cufile.json").write_text(
        '{\n // "use_pci_p2pdma": false,\n "properties": {\n "use_pci_p2pdma": true, // since 1.14\n },\n}\n'
    )
    assert refused(probe()) is None


def test_without_driver_and_compatibility_mode_nothing_can_be_called(machine: Path) -> None:
    (machine / "cufile.json").write_text('{"properties": {"allow_compat_mode": false}}')
    found = probe()
    assert (found.usable, found.native) == (False, False) and "forbids" in (refused(found) or "")


def test_the_cpu_has_none_of_it() -> None:
    assert Gds("cpu", nobody).refusal() == "only for CUDA devices"


def test_a_short_read_is_told_even_where_the_bytes_lay_already(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = random_file(tmp_path / "a.gguf", 10_000, 1)
    target = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    item = Item(1, path.name, 10_000, 0, (os.open(path, os.O_RDONLY), None), target, lambda *_: None, lambda *_: None)
    end = gds.spoil_end(torch, item)
    with pytest.raises(RuntimeError, match="did not read all"):
        gds.check_end(torch, item, end)
    target.copy_(torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8))
    gds.check_end(torch, item, end)
