"""Tests against a real daemon and a real mount; see tests/harness.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from instantstart_fs.mount import kernel
from tests import harness
from tests.harness import make_daemon, model, skip_below, why_no_mount

__all__ = ["make_daemon", "model"]

EACH = ("pyfuse3", "passthrough", "bind")
TRANSPORTS = {
    **dict.fromkeys(("test_bytes", "test_churn", "test_generations", "test_many_processes", "test_state"), EACH),
    "test_staging": ("passthrough", "bind"),
}
"""Modules whose tests run on several transports; the others on what `auto` gives."""
LONG = {"test_churn", "test_many_processes"}
"""Those of them that run over bind only with the long runs."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    module = metafunc.module.__name__.rpartition(".")[2]
    if module in TRANSPORTS and "make_daemon" in metafunc.fixturenames:
        bind = pytest.param("bind", marks=pytest.mark.soak if module in LONG else ())
        chosen = [bind if name == "bind" else name for name in TRANSPORTS[module]]
        metafunc.parametrize("transport", chosen, indirect=True)


@pytest.fixture(
    scope="module",
    params=["auto", pytest.param("bind", marks=pytest.mark.soak), pytest.param("pyfuse3", marks=pytest.mark.soak)],
)
def shared_transport(request: pytest.FixtureRequest) -> str:
    """Of a daemon that a module's tests share; on all of them with the long runs."""
    return harness.TRANSPORT if request.param == "auto" else str(request.param)


@pytest.fixture(autouse=True)
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = getattr(request, "param", None)
    if chosen is None:
        return
    if chosen == "passthrough" and (reason := kernel.why_no_passthrough()) is not None:
        pytest.skip(f"no FUSE passthrough: {reason}")
    if chosen == "bind" and not kernel.has_sys_admin():
        pytest.skip("binds need CAP_SYS_ADMIN")
    monkeypatch.setattr(harness, "TRANSPORT", chosen)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip_below(Path(__file__).parent, items, why_no_mount())
