"""The suite's own promises: a test that hangs, or a random one that fails, fails alone, and the same way each time."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness import REPOSITORY, why_no_mount

CONFTEST = """
pytest_plugins = ["tests.timeouts", "tests.randomness"]
"""
INI = "[pytest]\ntrio_mode = true\ntimeout = 1\ntimeout_method = signal\naddopts = --import-mode=importlib\n"
OTHERS = "".join(f"def test_other_{k}(): pass\n" for k in range(20))

HANGS = {
    "python": "def test_hangs(): threading.Event().wait()",
    "in_teardown": "@pytest.fixture\ndef slow():\n    yield\n    time.sleep(600)\ndef test_hangs(slow): pass",
    "after_a_failure": "@pytest.fixture\ndef slow():\n    yield\n    time.sleep(600)\ndef test_hangs(slow): assert 0",
    "trio": """
async def test_hangs(tmp_path):
    try:
        await trio.sleep_forever()
    finally:
        (tmp_path / "finalized").touch()
""",
    "trio_shielded": """
async def test_hangs():
    with trio.CancelScope(shield=True):
        await trio.sleep_forever()
""",
    "trio_blocked": "async def test_hangs(): time.sleep(600)",
    "trio_in_random": """
@pytest.mark.timeout(1)
@given(st.integers())
def test_hangs(number):
    trio.run(trio.sleep_forever)
""",
    "random": """
@pytest.mark.timeout(1)
@given(st.lists(st.integers()))
def test_hangs(numbers):
    time.sleep(600)
""",
    "swallowing": """
def test_hangs():
    while True:
        try:
            time.sleep(600)
        except BaseException:
            pass
""",
    "with_the_lock": """
def test_hangs():
    mutex = ctypes.create_string_buffer(64)
    libc = ctypes.PyDLL(None)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)
""",
}
FUSE = """
@pytest.fixture
def mount(tmp_path):
    env = {**os.environ, "FAKE_TRANSPORT": "pyfuse3", "PYTHONPATH": %(root)r}
    command = [sys.executable, %(root)r + "/tests/fuse/fake_view.py", str(tmp_path / "mnt")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as daemon:
        assert daemon.stdout.readline() == b"ready\\n"
        yield tmp_path / "mnt"
        daemon.kill()
        subprocess.run(["umount", "-l", tmp_path / "mnt"], check=True)
"""
FUSE_HANGS = {
    "read_of_a_mount": FUSE
    + """
@pytest.mark.timeout(2, func_only=True)
def test_hangs(mount):
    fd = os.open(mount / "model/stuck0", os.O_RDONLY)
    os.pread(fd, 4096, 0)
""",
    "page_fault_of_a_mount": FUSE
    + """
@pytest.mark.timeout(2, func_only=True)
def test_hangs(mount):
    with open(mount / "model/stuck0", "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        memory[0]
""",
}
IMPORTS = (
    "import ctypes, mmap, os, subprocess, sys, threading, time\nimport pytest, trio\n"
    "from hypothesis import given, settings, strategies as st\n"
)


def suite_of(directory: Path, modules: dict[str, str]) -> None:
    directory.mkdir()
    (directory / "conftest.py").write_text(CONFTEST)
    (directory / "pytest.ini").write_text(INI)
    for name, text in modules.items():
        (directory / f"test_{name}.py").write_text(IMPORTS + text % {"root": str(REPOSITORY)})


def pytest_run(
    directory: Path, *arguments: str, module: str = "pytest", timeout: float = 100.0, **env: str
) -> tuple[int, str]:
    """Its exit status, and what it printed."""
    command = [sys.executable, "-m", module, "-rA", "--durations=0", "-p", "no:cacheprovider", f"--rootdir={directory}"]
    command += [f"--basetemp={directory.parent / 'base'}", *arguments, str(directory)]
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "INSTANTSTART_"))}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY,
        env={**outer, "INSTANTSTART_TEST_GRACE": "2", "COLUMNS": "200", **env}, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            text, _ = process.communicate(timeout=timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):  # a killed worker's daemons too
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, text


def outcomes(text: str) -> dict[str, set[str]]:
    """By module, of the summary's lines."""
    found: dict[str, set[str]] = {}
    for outcome, name in re.findall(r"^(PASSED|FAILED|ERROR) \S*test_(\w+)\.py::", text, re.MULTILINE):
        found.setdefault(name, set()).add(outcome)
    return found


def test_whatever_hangs_the_others_go_on(tmp_path: Path) -> None:
    hangs = HANGS | (FUSE_HANGS if why_no_mount() is None else {})
    suite_of(tmp_path / "suite", {**hangs, "others": OTHERS})
    status, text = pytest_run(tmp_path / "suite", "-n", "4", "--max-worker-restart=20")
    assert status == 1, text[-6000:]
    assert re.search(r"\d+ failed, 2\d passed", text), text[-5000:]
    found = outcomes(text)
    assert found.pop("others") == {"PASSED"} and len(re.findall("^PASSED .*test_other_", text, re.MULTILINE)) == 20
    assert found == {
        **{name: {"FAILED"} for name in hangs},
        "after_a_failure": {"FAILED", "ERROR"},
        "in_teardown": {"PASSED", "ERROR"},
    }, text[-5000:]
    died = {name for name in hangs if re.search(rf"crashed while running '\S*test_{name}.py", text)}
    # One that faults on a page is ended by SIGBUS when its mount's connection is: that is its process's end, too.
    assert died == {"swallowing", "with_the_lock"} | ({"page_fault_of_a_mount"} & hangs.keys()), text[-5000:]
    # A time-out may come just where an event loop closes what is its own, and that fails then: for another reason.
    otherwise = [
        name for name in hangs if name not in died and not re.search(rf"test_{name}.py\S* - \S*TimedOut", text)
    ]
    assert len(otherwise) <= 1, text[-5000:]
    assert list(tmp_path.glob("base/**/finalized")), "trio's fixtures and finally clauses ran"


def test_alone_in_its_process_one_that_hangs_lets_the_next_go_on(tmp_path: Path) -> None:
    suite_of(tmp_path / "suite", {"a_hang": HANGS["python"], "others": OTHERS})
    status, text = pytest_run(tmp_path / "suite")
    assert (status, outcomes(text)) == (1, {"a_hang": {"FAILED"}, "others": {"PASSED"}}), text[-3000:]
    assert "the test took longer than 1 s" in text and "stacks when the time was over" in text


RANDOM = """
@given(st.lists(st.integers(), min_size=3))
def test_draws(numbers):
    with open(os.environ["DRAWN"], "a") as file:
        file.write(repr(numbers) + "\\n")

@given(st.lists(st.integers(0, 10**9)))
def test_fails(numbers):
    time.sleep(0.01)
    assert sum(numbers) < 10**6
"""
"""Of 'test_fails' every example that is drawn is another, and shrinking would try thousands."""


@pytest.fixture
def random_suite(tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """Run one, its arguments those of ``pytest_run``: its exit status, what it printed, and what was drawn."""
    suite_of(tmp_path / "suite", {"random": RANDOM})

    def go(*arguments: str, **env: str) -> tuple[int, str, str]:
        out = tmp_path / "drawn"
        out.write_bytes(b"")
        env = {"DRAWN": str(out), "INSTANTSTART_TEST_SHRINKING": "1", **env}
        return *pytest_run(tmp_path / "suite", *arguments, **env), out.read_text()

    return go


def test_random_tests_are_the_same_each_time_and_shrink_within_their_budget(
    random_suite: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    status, text, first = random_suite()
    assert status == 1 and "1 failed, 1 passed" in text and "@reproduce_failure(" in text, text[-3000:]
    seconds = re.search(r"([0-9.]+)s call .*test_fails", text)
    assert seconds is not None and float(seconds[1]) < 10
    # Another module is loaded, too, as the tests before may have done: its numbers may not change what is drawn.
    (tmp_path / "other.py").write_text(f"NUMBERS = {list(range(12345, 20000, 137))}")
    assert random_suite("-p", "other", PYTHONPATH=str(tmp_path))[2] == first and first.count("\n") == 100


def test_the_explorer_draws_anew_and_tells_what_repeats_its_finding(
    random_suite: Callable[..., tuple[int, str, str]],
) -> None:
    def explore(*arguments: str) -> tuple[str, str]:
        status, text, drawn = random_suite("--minutes", "0", "-n", "0", *arguments, module="tests.explore")
        assert status == 1 and "explore: 1 rounds, 1 findings" in text, text[-3000:]
        found = re.search(r"again: scripts/test --explore --seed (\d+) \S+::test_fails\n.*@reproduce_failure", text)
        assert found is not None, text[-3000:]
        return found[1], drawn

    seed, drawn = explore()
    assert explore()[1] != drawn
    assert explore("--seed", seed) == (seed, drawn)


UNSTEADY = """
import os
import pytest

@pytest.mark.parametrize("number", range(%(unsteady)s))
def test_beside_others(number):
    assert "PYTEST_XDIST_WORKER" not in os.environ

def test_another():
    %(another)s
"""
ALONE_SKIPS = 'assert "PYTEST_XDIST_WORKER" not in os.environ; pytest.skip("alone")'
BESIDE_DIES = 'os._exit(1) if "PYTEST_XDIST_WORKER" in os.environ else None'


@pytest.mark.parametrize(
    ("unsteady", "another", "named", "status"),
    [
        (1, "pass", 1, 0),
        (1, "assert False", 1, 1),
        (4, "pass", 0, 1),
        (1, ALONE_SKIPS, 1, 1),
        (1, BESIDE_DIES, 0, 1),
        (1, "pass\nimport nothing_of_the_kind", 0, 1),
    ],
    ids=["passes alone", "another fails alone", "too many", "skips alone", "ends its process", "another is no module"],
)
def test_what_fails_only_beside_others_is_named_and_fails_no_run(
    tmp_path: Path, unsteady: int, another: str, named: int, status: int
) -> None:
    suite = tmp_path / "suite"
    suite.mkdir()
    (suite / "conftest.py").write_text('pytest_plugins = ["tests.unsteady"]\n')
    (suite / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib -p xdist\n")
    another, _, broken = another.partition("\n")
    (suite / "test_unsteady.py").write_text(UNSTEADY % {"unsteady": unsteady, "another": another})
    (suite / "test_broken.py").write_text(broken)
    found, text = pytest_run(
        suite, "-n", "1", "--max-worker-restart=2", PYTHONPATH=str(REPOSITORY), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1"
    )
    assert found == status, text[-3000:]
    assert text.count("UNSTEADY ") == named, text[-3000:]
    assert "FAILED" in text
