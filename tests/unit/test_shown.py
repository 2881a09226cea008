"""What people see on terminals of a fixed width, as it is drawn."""

from __future__ import annotations

import contextlib
import io
import textwrap

import msgspec
import pytest

from instantstart_fs.cli import progress, show, timeline, watch
from instantstart_fs.core.coldstart import ColdStart
from instantstart_fs.core.humanize import reason_first
from instantstart_fs.core.status import ErrorStatus, FillStatus
from tests.statuses import pipeline_status

MESSAGE = (
    "hf://org/my-llm@main: model-00001-of-00002.safetensors: "
    "http://cdn.hub.example:8443/repos/ab/cd/abcdef0123456789?Signature=x: connection refused"
)
FILLING = pipeline_status(
    pipeline="my-llm",
    state="filling",
    cached_bytes=3_000_000_000,
    total_bytes=60_000_000_000,
    source=("hf://org/my-llm@main",),
    revision="c0ffee",
    pinned=True,
    fill=FillStatus(119_000_000, 483, 40_000_000),
    error=ErrorStatus("origin-unavailable", MESSAGE, "2026-01-01T00:00:00Z"),
)
OTHERS = [
    msgspec.structs.replace(FILLING, pipeline="warm-one", state="warm", cached_bytes=60 * 10**9, fill=None, error=None),
    msgspec.structs.replace(
        FILLING,
        pipeline="full",
        state="cold",
        cached_bytes=0,
        fill=None,
        error=None,
        pinned=False,
        uncached="store full: needs 60.0 GB; evictable 0 B; hot: warm-one, my-llm",
    ),
]


def test_ls_at_four_widths() -> None:
    for width, wanted in LS.items():
        drawn = show.pipelines([FILLING, *OTHERS], width=width)
        assert drawn == textwrap.dedent(wanted).strip("\n"), f"at {width}:\n{drawn}"


LS = {
    60: """
          PIPELINE STATE       % FILL
        ● my-llm   filling   5 % 119 MB/s, 8 min 3 s left pinned
          connection refused (cdn.hub.example:8443,
            model-00001-of-00002.safetensors, hf://org/my-llm@main)
        ● warm-one warm    100 % -                        pinned
        ○ full     cold      0 % -
          uncached: store full: needs 60.0 GB; evictable 0 B; hot:
            warm-one, my-llm
    """,
    80: """
          PIPELINE STATE       % SIZE               FILL                     REQUESTED
        ● my-llm   filling   5 % 3.00 GB of 60.0 GB 119 MB/s, 8 min 3 s left never
          connection refused (cdn.hub.example:8443, model-00001-of-00002.safetensors,
            hf://org/my-llm@main)
        ● warm-one warm    100 % 60.0 GB            -                        never
        ○ full     cold      0 % 60.0 GB            -                        never
          uncached: store full: needs 60.0 GB; evictable 0 B; hot: warm-one, my-llm
    """,
    100: """
          PIPELINE STATE       % SIZE               FILL                     REQUESTED HOT UNTIL
        ● my-llm   filling   5 % 3.00 GB of 60.0 GB 119 MB/s, 8 min 3 s left never     -         pinned
          connection refused (cdn.hub.example:8443, model-00001-of-00002.safetensors, hf://org/my-llm@main)
        ● warm-one warm    100 % 60.0 GB            -                        never     -         pinned
        ○ full     cold      0 % 60.0 GB            -                        never     -
          uncached: store full: needs 60.0 GB; evictable 0 B; hot: warm-one, my-llm
    """,
    120: """
          PIPELINE STATE       % SIZE               FILL                     REQUESTED HOT UNTIL SOURCE
        ● my-llm   filling   5 % 3.00 GB of 60.0 GB 119 MB/s, 8 min 3 s left never     -         hf://org/my-llm@main pinned
          connection refused (cdn.hub.example:8443, model-00001-of-00002.safetensors, hf://org/my-llm@main)
        ● warm-one warm    100 % 60.0 GB            -                        never     -         hf://org/my-llm@main pinned
        ○ full     cold      0 % 60.0 GB            -                        never     -         hf://org/my-llm@main
          uncached: store full: needs 60.0 GB; evictable 0 B; hot: warm-one, my-llm
    """,  # noqa: E501
}


@pytest.mark.parametrize("width", [24, 40, 60, 80, 100, 120, 200])
@pytest.mark.parametrize("name", ["m", "a-pipeline-with-a-rather-long-name-indeed"])
def test_the_bar_keeps_rate_and_eta_beside_an_error(width: int, name: str) -> None:
    shown, below = progress.lines(
        name, 3_040_000_000, 60_000_000_000, show.rate_line(FILLING), reason_first(MESSAGE), width
    )
    assert len(shown) <= width and len(below) <= width
    assert below.startswith("connection refused")
    if width >= 60:
        assert "5 %  " in shown and "119 MB/s, 8 min 3 s left" in shown
        assert "(cdn.hub.example:8443" in below
    if width >= 80 and name == "m":
        assert shown.startswith("m  █░") and "3.04 GB of 60.0 GB" in shown
    assert progress.lines(name, 0, 0, "", "", width)[1] == ""


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (MESSAGE, "connection refused (cdn.hub.example:8443, model-00001-of-00002.safetensors, hf://org/my-llm@main)"),
        ("m.bin: no progress for 60 s (http://h:1/a/b: cut)", "no progress for 60 s (h:1: cut) (m.bin)"),
        ("https://user:secret@h/p?X-Amz-Signature=1 answers 503", "h answers 503"),
        ("my-llm: a.bin: gone", "gone (a.bin)"),
        ("nothing to see: here", "nothing to see: here"),
        ("plain", "plain"),
    ],
)
def test_the_reason_comes_first_and_a_host_for_its_address(message: str, shown: str) -> None:
    assert reason_first(message, "my-llm") == shown


def test_bytes_on_their_way_are_progress_and_not_presence() -> None:
    slow = msgspec.structs.replace(
        FILLING, cached_bytes=0, total_bytes=100, error=None, fill=FillStatus(10, 5, received_bytes=50)
    )
    assert show.percent(slow) == 50 and show.progress(slow) == 50
    assert "50 %  0 B of 100 B, 50 B of the next chunks" in show.pipeline(slow)
    assert show.percent(msgspec.structs.replace(slow, fill=FillStatus(10, 5, received_bytes=100))) == 99


def test_explain_and_mark_say_that_a_mark_came_late(capsys: pytest.CaptureFixture[str]) -> None:
    second = 1_000_000_000
    usual = ColdStart(pipeline="m", started_ns=second, state="warm", read_after=4.0, ready_ns=9 * second)
    late = ColdStart(pipeline="m", started_ns=60 * second, state="warm", read_after=4.0, ready_ns=1320 * second)
    timeline.draw("m", [late, usual])
    drawn = capsys.readouterr().out
    assert max(len(line) for line in drawn.splitlines() if line.startswith("  engine")) <= 2 + 12 + timeline.WIDTH + 16
    assert "… 20 min 56 s" in drawn and "mark m ready --at TIME" in drawn
    assert drawn.count("█") >= 2 * timeline.WIDTH * 4 // 24, "the scale is the late one's"
    told = timeline.marked([late, usual], "ready")
    assert "counted for the cold start of 1970-01-01" in told and "20 min 56 s after what went before it" in told
    assert timeline.marked([usual], "ready") == "" == timeline.marked([], "ready")


def test_ls_watch_draws_over_what_was_there() -> None:
    assert watch.frame("a\nb", 3) == "\x1b[Ha\x1b[K\r\nb\x1b[K\x1b[J"
    assert "… 3 more lines" in watch.frame("a\nb\nc\nd", 2)
    shown: list[float] = []

    def pause(seconds: float) -> None:
        shown.append(seconds)
        if len(shown) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), contextlib.redirect_stdout(io.StringIO()) as out:
        watch.watch(lambda: "text", pause=pause)
    assert out.getvalue() == "text\n\ntext\n\n"
