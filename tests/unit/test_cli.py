"""The command line against a scripted daemon: exit statuses, what goes to stdout and to stderr, and what it imports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Self

import msgspec
import pytest
import typer
from typer.core import TyperGroup
from typer.main import get_command

from instantstart_fs.cli import run, serve, show
from instantstart_fs.cli.app import app, app_for
from instantstart_fs.cli.verbs import ALIASES, ANSWERS
from instantstart_fs.control.protocol import DaemonInfo, VerifyResult
from instantstart_fs.control.specification import specification
from instantstart_fs.core.humanize import did_you_mean, human_seconds, pipeline_meant
from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.core.status import ErrorStatus, FileStatus, FillStatus, ListedStatus, PipelineStatus
from instantstart_fs.errors import (
    DaemonUnreachable,
    InvalidName,
    InvalidSource,
    OriginUnavailable,
    PipelineNotFound,
    UsageError,
)
from tests.harness import REPOSITORY
from tests.statuses import pipeline_status

FILES = (FileStatus("a.json", "sealed", 1000, 1000, "sha256:ab"), FileStatus("b.safetensors", "absent", 9000, 0, None))
STATUS = pipeline_status(
    state="filling",
    cached_bytes=1000,
    total_bytes=10_000,
    generation=2,
    revision="c0ffee",
    last_request="2026-01-01T00:00:00Z",
    pinned=True,
    leases=1,
    fill=FillStatus(3000, 3),
    error=ErrorStatus("origin-unavailable", "no route", "2026-01-01T00:00:00Z"),
    files=FILES,
)


class FakeClient:
    """Answers from attributes of the class; notes what it was asked."""

    calls: ClassVar[list[tuple[Any, ...]]]
    raises: Exception | None
    verified: VerifyResult

    def __init__(self, socket: str | None = None) -> None:
        self.calls.append(("connect", socket))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def _call(self, *call: Any) -> None:
        self.calls.append(call)
        if self.raises is not None:
            raise self.raises

    def ping(self) -> DaemonInfo:
        return DaemonInfo("0", 1, "/models", "/store", 1.0, 1, True)

    def add(self, spec: PipelineSpec, *, warm: bool = False) -> PipelineStatus:
        self._call("add", spec, warm)
        return STATUS

    def update(self, pipeline: str) -> PipelineStatus:
        self._call("update", pipeline)
        return STATUS

    def status(self, pipeline: str, *, brief: bool = False) -> PipelineStatus:
        self._call("status", pipeline)
        return msgspec.structs.replace(STATUS, files=None, listed=ListedStatus(2, 10_000)) if brief else STATUS

    def pipelines(self) -> list[PipelineStatus]:
        self._call("ls")
        return [msgspec.structs.replace(STATUS, files=None)]

    def remove(self, pipeline: str, *, force: bool = False) -> list[str]:
        self._call("remove", pipeline, *(("force",) if force else ()))
        return []

    def evict(self, pipeline: str, *, force: bool = False) -> list[str]:
        self._call("evict", pipeline, *(("force",) if force else ()))
        return ["pid 7 (engine, uid 1)"] if force else []

    def touch(self, pipeline: str) -> None:
        self._call("touch", pipeline)

    def set_pinned(self, pipeline: str, pinned: bool) -> None:
        self._call("pin", pipeline, pinned)

    def warm(self, pipeline: str, *, everything: bool = False) -> PipelineStatus:
        self._call("warm", pipeline, everything)
        return STATUS

    def wait_warm(
        self, pipeline: str, *, everything: bool = False, progress: Callable[[PipelineStatus], None]
    ) -> PipelineStatus:
        self._call("wait", pipeline, everything)
        for cached in (0, 500, 1200, 1300, 9000):
            progress(msgspec.structs.replace(STATUS, cached_bytes=cached, error=None))
        return msgspec.structs.replace(STATUS, state="warm", cached_bytes=10_000, files=None)

    def check_access(self, pipeline: str, *, token_file: str | None = None) -> list[str]:
        self._call("access", pipeline)
        return ["hf://o/r"]

    def verify(self, pipeline: str, progress: Callable[[int, int], None], *, rate: float | None = None) -> VerifyResult:
        self._call("verify", pipeline, *(() if rate is None else (rate,)))
        progress(50, 100)
        return self.verified


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> type[FakeClient]:
    class Fresh(FakeClient):
        calls: ClassVar[list[tuple[Any, ...]]] = []
        raises = None
        verified = VerifyResult(2, 10_000, (), ())

    monkeypatch.setattr("instantstart_fs.control.client.Client", Fresh)
    return Fresh


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        (["remove", "x"], ("remove", "x")),
        (["evict", "x"], ("evict", "x")),
        (["remove", "x", "--force"], ("remove", "x", "force")),
        (["evict", "x", "--force"], ("evict", "x", "force")),
        (["pin", "x"], ("pin", "x", True)),
        (["unpin", "x"], ("pin", "x", False)),
        (["touch", "x"], ("touch", "x")),
        (["update", "x"], ("update", "x")),
        (["warm", "x", "--all"], ("warm", "x", True)),
        (["warm", "x", "--wait"], ("wait", "x", False)),
        (["verify", "x"], ("verify", "x")),
        (["verify", "x", "--rate", "200MB"], ("verify", "x", 200_000_000)),
        (["verify", "x", "--access"], ("access", "x")),
        (["status", "x"], ("status", "x")),
        (["status", "x", "?"], ("status", "x")),
        (["status"], ("ls",)),
        (["ls"], ("ls",)),
        (["ls", "x"], ("ls",)),
        (["ls", "x", "?"], ("ls",)),
    ],
)
def test_each_command_asks_for_what_it_says(
    client: type[FakeClient], arguments: list[str], call: tuple[Any, ...]
) -> None:
    assert run([*arguments, "--socket", "/run/elsewhere"]) == 0
    assert client.calls[0] == ("connect", "/run/elsewhere")
    assert call in client.calls


@pytest.mark.parametrize(
    ("line", "shows"),
    [
        (["remove", "x"], {"pipeline": "x", "open_by": []}),
        (["evict", "x", "--force"], {"pipeline": "x", "open_by": ["pid 7 (engine, uid 1)"]}),
        *((line.split(), json.loads(show.as_json(STATUS.brief))) for line in ("pin x", "unpin x", "touch x")),
    ],
)
def test_a_change_is_an_object_with_json(
    client: type[FakeClient], capsys: pytest.CaptureFixture[str], line: list[str], shows: dict[str, Any]
) -> None:
    assert run([*line, "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == shows
    assert said.err == ""


@pytest.mark.parametrize(
    ("line", "pinned"),
    [("pin x --json", True), ("unpin x --json", False), ("touch x --json", STATUS.pinned)],
)
def test_a_change_that_was_made_is_no_failure_though_its_status_cannot_be_had(
    client: type[FakeClient],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    pinned: bool,
) -> None:
    forget_after(client, monkeypatch, "pin", "touch")
    assert run(line.split()) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == json.loads(show.as_json(msgspec.structs.replace(STATUS.brief, pinned=pinned)))
    assert said.err.startswith("instantstart: x: ") and "its status is from before: the daemon is gone" in said.err


@pytest.mark.parametrize("line", ["add x o/r", "update x"])
def test_a_pipeline_that_was_added_is_no_failure_though_nothing_more_can_be_said_of_it(
    client: type[FakeClient], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    forget_after(client, monkeypatch, "add", "update")
    assert run(line.split()) == 0
    said = capsys.readouterr()
    assert said.out.startswith("x: generation ")
    assert said.err == "instantstart: x: no more can be said of it: the daemon is gone\n"


def forget_after(client: type[FakeClient], monkeypatch: pytest.MonkeyPatch, *verbs: str) -> None:
    """The daemon answers no question for a status after one of these verbs."""
    known = client.status

    def status(self: FakeClient, pipeline: str, *, brief: bool = False) -> PipelineStatus:
        if any(call[0] in verbs for call in client.calls):
            raise DaemonUnreachable("the daemon is gone")
        return known(self, pipeline, brief=brief)

    monkeypatch.setattr(client, "status", status)


def test_a_pin_of_no_pipeline_is_refused_before_anything_is_done(
    client: type[FakeClient], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object, **__: object) -> PipelineStatus:
        raise PipelineNotFound("there is no pipeline y")

    monkeypatch.setattr(client, "status", unknown)
    assert run(["pin", "y", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "pipeline-not-found"
    assert not [call for call in client.calls if call[0] == "pin"]


def test_no_daemon_to_stop_is_said_in_json_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["stop", "--json", "--socket", str(tmp_path / "none")]) == 0
    assert json.loads(capsys.readouterr().out) == {"stopped": False}


@pytest.mark.parametrize("before", [[], ["--socket", "/run/elsewhere"]], ids=["alone", "after an option"])
@pytest.mark.parametrize(("alias", "verb"), ALIASES.items())
def test_an_alias_is_its_verb(
    client: type[FakeClient], capsys: pytest.CaptureFixture[str], before: list[str], alias: str, verb: str
) -> None:
    assert run([*before, verb, "--help"]) == 0
    helped = capsys.readouterr().out
    assert run([*before, alias, "--help"]) == 0
    assert capsys.readouterr().out.replace(f"instantstart {alias}", f"instantstart {verb}") == helped
    asked: dict[str, list[tuple[Any, ...]]] = {}
    for word in (verb, alias):
        client.calls.clear()
        assert run([*before, word, "x"]) == (2 if verb == "unmount" else 0)  # x is no link
        asked[word] = [*client.calls]
    assert asked[alias] == asked[verb]


@pytest.mark.parametrize(("word", "answer"), ANSWERS.items())
def test_a_word_that_is_no_verb_is_answered_with_verbs_that_are(
    client: type[FakeClient], capsys: pytest.CaptureFixture[str], word: str, answer: str
) -> None:
    whole = get_command(app)
    assert isinstance(whole, TyperGroup) and word not in whole.commands
    for before in ([], ["--socket", "/run/elsewhere"]):
        assert run([*before, word, "x"]) == 2
        assert " ".join(capsys.readouterr().err.split()) == f"instantstart: there is no `{word}`: {answer}"
    assert client.calls == []
    ours = [line.split() for line in re.findall(r"`(.*?)`", answer) if line.split()[0] not in ("hf", "systemctl")]
    for verb, *more in ours:
        command = whole.commands[verb]
        if isinstance(command, TyperGroup):
            command = command.commands[more.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {part for part in more if part.startswith("-")} <= known


@pytest.mark.parametrize("rate", ["1e-300", "nan", "inf", "0", "-1", "1KB", "9" * 5000])
def test_a_rate_that_would_never_end_is_a_usage_error(client: type[FakeClient], capsys: Any, rate: str) -> None:
    assert run(["verify", "x", "--rate", rate]) == 2
    assert "--rate" in capsys.readouterr().err
    assert client.calls == []


@pytest.mark.parametrize("at", ["-1", "1e300", "1e11", "nan", "inf", "0001-01-01T00:00:00Z"])
def test_a_time_that_nobody_can_mean_is_a_usage_error(client: type[FakeClient], at: str) -> None:
    assert run(["mark", "x", "ready", f"--at={at}"]) == 2
    assert client.calls == []


def test_add_sends_the_whole_specification(client: type[FakeClient], tmp_path: Path, capsys: Any) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    arguments = ["add", "x", "--model", "asr=hf://o/r@v1", "--model", "tts=s3://bucket/tts", "--owner", "7:8"]
    arguments += ["--mode", "0550", "--include", "*.json", "--exclude", "*.bin", "--token-file", str(token)]
    assert run([*arguments, "--aws-profile", "ml", "--endpoint-url", "http://s3", "--warm"]) == 0
    globs = (("*.json",), ("*.bin",))
    models = (ModelSpec("hf://o/r@v1", "asr", *globs), ModelSpec("s3://bucket/tts", "tts", *globs))
    wanted = PipelineSpec("x", models, 7, 8, 0o550, str(token), "ml", "http://s3")
    assert ("add", wanted, True) in client.calls
    shown = capsys.readouterr().out
    for part in ("c0ffee", "hf://o/r", "2, 10.0 kB", "/models/x", "filling has begun"):
        assert part in shown


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["ls", "--nonsense"],
        ["remove"],
        ["add", "x"],
        ["add", "x", "hf://o/r", "--model", "a=hf://o/r"],
        ["add", "x", "--model", "hf://o/r"],
        ["add", "x", "--model", "a=hf://o/r", "--model", "a=hf://o/q"],
        ["add", "x", "ftp://o/r"],
        ["add", "../x", "hf://o/r"],
        ["add", "x", "hf://o/r", "--mode", "0777"],
        ["add", "x", "hf://o/r", "--owner", "nobody-of-that-name"],
        ["add", "x", "hf://o/r", "--token-file", "/no/such/file"],
        ["lease", "x"],
        ["lease", "x", "--"],
        ["serve", "--log-level", "loud"],
        ["serve", "--config", "/no/such/file"],
    ],
)
def test_usage_errors_exit_2_and_ask_nobody(client: type[FakeClient], arguments: list[str], capsys: Any) -> None:
    assert run(arguments) == 2
    assert client.calls == []
    captured = capsys.readouterr()
    assert captured.err or arguments == []


def test_failures_exit_1_with_one_line(client: type[FakeClient], capsys: Any) -> None:
    client.raises = PipelineNotFound("there is no pipeline 'x'")
    assert run(["status", "x"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "instantstart: there is no pipeline 'x'\n"


def test_failures_are_objects_with_json(client: type[FakeClient], capsys: Any) -> None:
    client.raises = OriginUnavailable("the hub is away")
    assert run(["add", "x", "hf://o/r", "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"error": {"code": "origin-unavailable", "message": "the hub is away"}}
    assert captured.err == "instantstart: the hub is away\n"


@pytest.mark.parametrize(
    "line",
    [
        ["ls", "--jsn", "--json"],
        ["add", "--json"],
        ["warm", "x", "y", "--json"],
        ["regional", "gc", "--hosts", "--json"],
        ["nonsense", "--json"],
        ["--socket", "s", "status", "--json", "--jsn"],
        ["--bogus", "--json"],
        ["--json"],
        ["--json", "--socket"],
        ["--jsn", "ls", "x", "--json"],
    ],
)
def test_a_mistake_in_a_line_is_an_object_with_json(client: type[FakeClient], capsys: Any, line: list[str]) -> None:
    assert run(line) == 2
    said = capsys.readouterr()
    error = json.loads(said.out)["error"]
    assert error["code"] == "usage" and error["message"] in said.err
    assert client.calls == []


@pytest.mark.parametrize("line", [["lease", "x", "--", "true", "--json"], ["lease", "x", "true", "--json"]])
def test_the_json_of_a_leased_command_is_its_own(client: type[FakeClient], capsys: Any, line: list[str]) -> None:
    client.lease = lambda self, pipeline: self._call("lease", pipeline)  # type: ignore[attr-defined]
    client.raises = PipelineNotFound("there is no pipeline 'x'")
    assert run(line) == 1
    said = capsys.readouterr()
    assert said.out == "" and "no pipeline 'x'" in said.err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["run", "x", "--redy-url", "u", "--", "true"], "--redy-url is no option (did you mean '--ready-url'?)"),
        (["run", "x", "--probe", "--", "true"], "--probe comes before the pipeline's id"),
        (["--socket", "s", "run", "x", "--quite", "--", "true"], "--quite is no option (did you mean '--quiet'?)"),
        (["lease", "x", "--socket", "s", "--", "true"], "--socket comes before the pipeline's id"),
        (["lease", "x", "--jsn", "true"], "--jsn is no option"),
    ],
)
def test_an_option_in_a_commands_place_is_not_run(
    client: type[FakeClient], capsys: Any, line: list[str], says: str
) -> None:
    assert run(line) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert client.calls == []


def test_the_socket_before_run_is_its_option(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("instantstart_fs.startup.run.run", lambda wanted: asked.append(wanted) or 7)
    assert run(["--socket", "s", "run", "x", "--ready-url", "u", "--", "true", "--json"]) == 7
    (wanted,) = asked
    assert (wanted.socket, wanted.pipeline, wanted.ready_url, wanted.command) == ("s", "x", "u", ["true", "--json"])


def test_the_document_names_every_command_that_takes_json() -> None:
    def named(command: Any, words: str = "") -> set[str]:
        if not isinstance(command, TyperGroup):
            return {words} if any("--json" in parameter.opts for parameter in command.params) else set()
        inner = command.commands.items()
        return set().union(*(named(one, f"{words} {name}".strip()) for name, one in inner))

    text = (REPOSITORY / "docs" / "CONFIGURATION.md").read_text()
    listed = text.partition("`--json` works with ")[2].partition(". A command")[0]
    assert set(re.findall("`(.*?)`", listed)) == {
        "prefetch" if name == "prefetch prefetch" else name for name in named(get_command(app))
    }


def test_no_daemon_is_one_line_that_says_what_to_do(tmp_path: Path, capsys: Any) -> None:
    assert run(["ls", "--socket", str(tmp_path / "none")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "instantstart start" in error


def test_status_json_is_the_documented_object(client: type[FakeClient], capsys: Any) -> None:
    assert run(["status", "x", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [
        "pipeline",
        "state",
        "cached_bytes",
        "total_bytes",
        "source",
        "generation",
        "revision",
        "last_request",
        "hot_until",
        "pinned",
        "leases",
        "fill",
        "error",
        "files",
    ]
    assert found["fill"] == {"bytes_per_second": 3000, "eta_seconds": 3}
    assert found["error"] == {"code": "origin-unavailable", "message": "no route", "since": "2026-01-01T00:00:00Z"}
    assert list(found["files"][0]) == ["path", "state", "size", "cached_bytes", "digest"]


def test_status_of_several_shows_each_and_is_a_list_in_json(client: type[FakeClient], capsys: Any) -> None:
    pair = [msgspec.structs.replace(STATUS, pipeline=name, files=None) for name in ("x1", "x2", "other")]
    client.pipelines = lambda self: pair  # type: ignore[method-assign]
    client.status = lambda self, name, **_: msgspec.structs.replace(STATUS, pipeline=name)  # type: ignore[method-assign]
    assert run(["status", "x*", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["pipeline"] for one in found] == ["x1", "x2"] and found[0]["files"]
    assert run(["status", "other", "x1"]) == 0
    assert capsys.readouterr().out.count("b.safetensors") == 2
    assert run(["status", "x1", "othre"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "did you mean 'other'?" in captured.err


def test_ls_json_is_a_list_without_files(client: type[FakeClient], capsys: Any) -> None:
    for arguments in (["ls", "--json"], ["status", "--json"]):
        assert run(arguments) == 0
        (found,) = json.loads(capsys.readouterr().out)
        assert found["pipeline"] == "x"
        assert "files" not in found
        assert "uncached" not in found


def test_uncached_appears_only_where_it_applies() -> None:
    found = json.loads(show.as_json(msgspec.structs.replace(STATUS, uncached="store full")))
    assert found["uncached"] == "store full"


def test_status_shows_all_that_a_person_asks_for(client: type[FakeClient], capsys: Any) -> None:
    assert run(["status", "x"]) == 0
    shown = capsys.readouterr().out
    parts = ["filling", "10 %", "1.00 kB of 10.0 kB", "3.00 kB/s, 3 s left", "hf://o/r", "c0ffee", "ago)", "no route"]
    for part in [*parts, "b.safetensors"]:
        assert part in shown
    assert "\x1b" not in shown


def test_waiting_prints_plain_lines_where_no_terminal_is(client: type[FakeClient], capsys: Any) -> None:
    assert run(["warm", "x", "--wait"]) == 0
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["x: 0 %", "x: 12 %", "x: 90 %"]
    assert captured.out.startswith("x: warm, 10.0 kB; fetched 10.0 kB in ")


def test_waiting_with_json_prints_the_object_alone(client: type[FakeClient], capsys: Any) -> None:
    assert run(["warm", "x", "--wait", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["state"] == "warm"
    assert captured.err == ""


def test_verify_fails_when_something_had_to_be_healed(client: type[FakeClient], capsys: Any) -> None:
    client.verified = VerifyResult(2, 10_000, ("b.safetensors",), ("a.json",))
    assert run(["verify", "x"]) == 1
    captured = capsys.readouterr()
    assert "b.safetensors" in captured.out
    assert "1 files did not hold" in captured.err


def test_version_and_help(capsys: Any) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("instantstart 0.")
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    commands = "serve add update remove evict pin unpin touch warm verify lease mark ls status explain fsck doctor"
    for command in commands.split():
        assert f"  {command} " in shown
    assert "..." not in shown.partition("Commands:")[2]


def test_the_short_way_into_serve_knows_all_that_the_long_one_does() -> None:
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    assert {option: parameter.name for parameter in command.params for option in parameter.opts} == serve.OPTIONS
    assert serve.parse(["serve"]) == {}
    words = ["serve", "--mount", "/m", "--log-format=json", "--mount", "/n"]
    assert serve.parse(words) == {"mount": "/n", "log_format": "json"}


@pytest.mark.parametrize(
    "words", [["ls"], [], ["serve", "--help"], ["serve", "x"], ["serve", "--mount"], ["serve", "--store", "--mount"]]
)
def test_what_is_unusual_goes_the_long_way(words: list[str]) -> None:
    assert serve.parse(words) is None


def test_client_commands_import_nothing_heavy() -> None:
    code = (
        "import sys; from instantstart_fs.cli import run; run(['ls', '--socket', '/nonexistent']);"
        "print([m for m in ('trio', 'boto3', 'huggingface_hub', 'pyfuse3', 'lmdb', 'urllib3', 'rich.progress')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_a_reader_that_has_had_enough_is_no_error(tmp_path: Path) -> None:
    code = "from instantstart_fs.cli import main; main(['--help'])"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    process.wait(60)
    assert b"Traceback" not in errors


def test_specifications_follow_the_rules_of_the_configuration() -> None:
    assert specification("x", "hf://o/r").mode == 0o555
    with pytest.raises(InvalidName):
        specification("x y", "hf://o/r")
    with pytest.raises(InvalidSource):
        specification("x", "nothing")
    with pytest.raises(UsageError):
        specification("x", None)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (90_868_376, "90.9 MB"),
        (999_900_000, "1.00 GB"),
        (5e17, "500 PB"),
    ],
)
def test_sizes_for_people(count: float, text: str) -> None:
    assert show.human_bytes(count) == text


def test_times_for_people() -> None:
    now = datetime(2026, 1, 1, 0, 1, tzinfo=UTC)
    assert show.human_time("2026-01-01T00:00:00Z", now).endswith("(1 min 0 s ago)")
    assert show.human_time("2026-01-01T02:01:00Z", now).endswith("(in 2 h 0 min)")
    assert show.human_time(None) == "never"


def test_percent_reaches_100_only_when_all_is_there() -> None:
    assert show.percent(msgspec.structs.replace(STATUS, cached_bytes=9999)) == 99
    assert show.percent(msgspec.structs.replace(STATUS, cached_bytes=10_000)) == 100
    assert show.percent(msgspec.structs.replace(STATUS, cached_bytes=0, total_bytes=0)) == 0


def test_status_of_all_ends_with_the_transport_and_why_no_faster_one(
    client: type[FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    info = DaemonInfo("0", 1, "/models", "/store", 1.0, 1, True, "pyfuse3 (Linux 6.1 is older than 6.9)")
    assert show.mounted(info) == "/models: pyfuse3 (Linux 6.1 is older than 6.9)"
    assert run(["status"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "/models: not mounted yet"


def test_ls_is_a_table_with_a_chip_on_a_terminal_and_plain_elsewhere() -> None:
    statuses = [
        msgspec.structs.replace(STATUS, pipeline="w", state="warm", cached_bytes=10_000, files=None, error=None),
        msgspec.structs.replace(STATUS, pipeline="c", state="cold", cached_bytes=0, files=None, error=None),
    ]
    drawn = show.pipelines(statuses, width=200).splitlines()
    assert [line.split()[:2] for line in drawn[1:]] == [["●", "w"], ["○", "c"]]
    plain = show.pipelines(statuses).splitlines()
    assert "●" not in "".join(plain) and "\x1b" not in "".join(plain)
    for lines in (drawn, plain):
        assert "HOT UNTIL" in lines[0] and "REQUESTED" in lines[0]
        assert "100 %" in lines[1] and "0 %" in lines[2]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140, 250])
@pytest.mark.parametrize("name", ["w", "a-pipeline-whose-name-goes-on-and-on-for-a-long-while-0123456789"])
@pytest.mark.parametrize("error", [None, ErrorStatus("origin", "nobody answers at https://hub.example", "x")])
def test_ls_cuts_nothing_short_that_is_no_source_in_a_narrow_terminal(
    width: int, name: str, error: ErrorStatus | None
) -> None:
    status = msgspec.structs.replace(
        STATUS,
        state="unverified",
        cached_bytes=3_000_000_000,
        total_bytes=6_000_000_000,
        files=None,
        fill=None,
        error=error,
    )
    statuses = [msgspec.structs.replace(status, pipeline=name), msgspec.structs.replace(status, pipeline="other")]
    drawn = show.pipelines(statuses, width=width).splitlines()
    assert all(len(line) <= max(width, 60) for line in drawn)
    if error is not None:
        below = [line for line in drawn if line.startswith("  ") and "nobody answers" in line]
        assert len(below) == 2 and all(line.strip().startswith("nobody answers at hub.example") for line in below)
        drawn = [line for line in drawn if line not in below]
    rows = [line for line in drawn if line.startswith("●")]
    assert len(rows) == 2
    for row in rows:
        assert "unverified" in row and "50 %" in row and "3.00 GB of 6.00 GB" in row
    assert "".join(line[2:].split(" ")[0] for line in drawn[1:-1]) == name
    assert width < 80 or "REQUESTED" in drawn[0]
    assert width < 100 or "HOT UNTIL" in drawn[0]
    assert width < 250 or "hf://" in drawn[1]


def test_names_that_an_origin_made_up_are_shown_and_not_obeyed() -> None:
    hostile = "x\n\x1b]0;title\x07.safetensors"
    status = pipeline_status(
        total_bytes=1,
        source=("s3://b/\x1b[2J",),
        revision="\x1b[2J",
        files=(FileStatus(hostile, "absent", 1, 0, None),),
    )
    for shown in (show.pipeline(status), show.pipelines([status]), show.pipelines([status], width=200)):
        assert "\x1b" not in shown and "\x07" not in shown
    assert len(show.pipeline(status).splitlines()) == len(
        show.pipeline(msgspec.structs.replace(status, files=(FileStatus("x", "absent", 1, 0, None),))).splitlines()
    )


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(59.4, "59 s"), (59.6, "1 min 0 s"), (3599.7, "1 h 0 min"), (5400.0, "1 h 30 min"), (48 * 3600 - 0.1, "2 days")],
)
def test_seconds_are_rounded_before_they_are_split(seconds: float, words: str) -> None:
    assert human_seconds(seconds) == words


def test_ls_of_some_and_what_was_meant() -> None:
    statuses = [msgspec.structs.replace(STATUS, pipeline=name, files=None) for name in ("llama-8b", "llama-70b", "asr")]

    def named(*wanted: str) -> list[str]:
        return [status.pipeline for status in show.chosen(statuses, wanted)]

    assert named() == ["llama-8b", "llama-70b", "asr"]
    assert named("asr", "llama-8b") == ["llama-8b", "asr"]
    assert named("llama-*") == ["llama-8b", "llama-70b"]
    with pytest.raises(PipelineNotFound, match=r"no pipeline 'lama-8b' .did you mean 'llama-8b'"):
        named("lama-8b")
    with pytest.raises(PipelineNotFound, match=r"no pipeline matches 'x\*'; `instantstart ls` lists them"):
        named("x*")
    assert did_you_mean("ASR", ["asr"]) == " (did you mean 'asr'?)"
    assert did_you_mean("nothing", ["asr"]) == ""
    with pytest.raises(PipelineNotFound, match=r"no pipeline '/mnt/models/asr' .did you mean 'asr'"):
        named("/mnt/models/asr")


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("/mnt/models/p", "p"),
        ("models/p/", "p"),
        ("/mnt/models/my-llm/config.json", "my-llm"),
        ("/mnt/models/my-lm", "my-llm"),
        ("/mnt/models/my-lm/", "my-llm"),
        ("/", None),
        ("//", None),
        ("/mnt/models/nothing", None),
    ],
)
def test_a_path_in_an_ids_place_names_what_was_meant(word: str, meant: str | None) -> None:
    assert pipeline_meant(word, ["my-llm", "p"]) == ("" if meant is None else f" (did you mean {meant!r}?)")


@pytest.mark.parametrize(
    "line",
    [
        ["add", "p", "hf://a/b", "http://me:it'ssecret@host"],
        ["http://me:secret@host"],
        ["--http://me:secret@host"],
        ["warm", "p", "--http://me:secret@host"],
        ["prefetch", "p", "s3://key:secret@bucket"],
    ],
)
def test_a_complaint_about_a_line_repeats_no_password(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line) == 2
    said = capsys.readouterr()
    assert "host" in said.err or "bucket" in said.err
    assert "secret" not in said.out + said.err


def test_a_line_builds_only_the_command_that_it_names() -> None:
    whole = get_command(app)
    assert isinstance(whole, TyperGroup)
    for name, command in whole.commands.items():
        narrowed = get_command(app_for([name, "--help"]))
        assert isinstance(narrowed, TyperGroup)
        assert name in narrowed.commands
        assert len(narrowed.commands) == 1 or name in ("version", "help")
        assert [one.name for one in narrowed.commands[name].params] == [one.name for one in command.params]
    for alias, name in ALIASES.items():
        narrowed = get_command(app_for([alias]))
        assert isinstance(narrowed, TyperGroup)
        assert list(narrowed.commands) == [name]
    for other in ([], ["--help"], ["--socket", "s", "ls"], ["no-such-verb"]):
        assert app_for(other) is app
