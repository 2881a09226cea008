"""What the commonest mistakes answer on a terminal of 80 columns: tests/unit/mistakes.txt, word for word.

After a change that is meant: `python -m tests.unit.test_mistakes` writes it anew; read it aloud.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from instantstart_fs.cli import run

TEXTS = Path(__file__).with_name("mistakes.txt")
HOME = "/home/charlie"
"""Where they are made, in the texts; as long as the directory's real name, since lines are broken by length."""
MISTAKES = (
    "stats",
    "ls --jsn",
    "ls",
    "ls --watch --json",
    "pull Qwen/Qwen3-8B",
    "login",
    "add Qwen/Qwen3-8B",
    "add my-llm",
    "add my-llm Qwen3-8B",
    "add my-llm https://huggingface.co/datasets/org/data",
    "add my-llm https://example.com/model",
    "add my-llm 'https://bucket.s3.amazonaws.com/model?X-Amz-Signature=secret'",
    "add my-llm org/repo --token-file hf-token",
    "add my-llm org/repo --quota '50 gigs'",
    "add my-llm org/repo --include '*.json' --owner nobody-here:staff",
    "add my-llm s3://bucket/model --anonymous --aws-profile models",
    "mount org/repo full",
    "mount org/repo no/such/place",
    "unmount full",
    "stop",
    "logs",
    "lease my-llm",
    "run my-llm --",
    "serve --config missing.toml",
    "serve --config wrong.toml",
    "serve --log-level loud",
    "config init wrong.toml",
    "fsck --store nowhere",
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def _made_there() -> Iterator[str]:
    directory = tempfile.mkdtemp(prefix="", dir="/tmp")
    assert len(directory) == len(HOME)
    before = os.getcwd()
    try:
        Path(directory, "full").mkdir()
        Path(directory, "full", "file").touch()
        Path(directory, "wrong.toml").write_text("[store]\ncapacty = '80%'\n")
        os.chdir(directory)
        env = {"INSTANTSTART_SOCKET": f"{directory}/control.sock", "HOME": directory, "COLUMNS": "80", "NO_COLOR": "1"}
        with mock.patch.dict(os.environ, env):
            yield directory
    finally:
        os.chdir(before)
        shutil.rmtree(directory)


def answers() -> str:
    found = []
    with _made_there() as directory:
        for words in MISTAKES:
            out, err = Terminal(), Terminal()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = run(shlex.split(words))
            said = (out.getvalue() + err.getvalue()).replace(directory, HOME).rstrip()
            found.append(f"$ instantstart {words}\n{said}\n(exit {status})\n")
    return "\n".join(found)


def test_the_commonest_mistakes_are_answered_as_written() -> None:
    assert answers() == TEXTS.read_text(encoding="utf-8")


def test_the_answers_fit_a_terminal() -> None:
    for line in TEXTS.read_text(encoding="utf-8").splitlines():
        words = line.split()
        assert len(line) <= 80 or line.startswith("$ ") or len(max(words, key=len)) > 60, line


if __name__ == "__main__":
    TEXTS.write_text(answers(), encoding="utf-8")
    sys.stdout.write(TEXTS.read_text(encoding="utf-8"))
