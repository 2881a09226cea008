"""What the commonest mistakes answer on a terminal of 80 columns: tests/unit/mistakes.txt, word for word.

After a change that is meant: `python -m tests.unit.test_mistakes` writes it anew; read it aloud.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests import mistakes

TEXTS = Path(__file__).with_name("mistakes.txt")
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
    "run my-llm --ready-timout 3m -- vllm serve /models/my-llm",
    "run my-llm --engine vlm -- true",
    "run my-llm --report no/dir/report.json -- true",
    "serve --config missing.toml",
    "serve --config wrong.toml",
    "serve --log-level loud",
    "config init wrong.toml",
    "fsck --store nowhere",
)


def texts() -> str:
    with mistakes.directory() as place:
        (place / "full").mkdir()
        (place / "full/file").touch()
        (place / "wrong.toml").write_text("[store]\ncapacty = '80%'\n")
        return mistakes.answers(MISTAKES, place, {"INSTANTSTART_SOCKET": f"{place}/control.sock"}, shown={})


def test_the_commonest_mistakes_are_answered_as_written() -> None:
    assert texts() == TEXTS.read_text(encoding="utf-8")


def test_the_answers_fit_a_terminal() -> None:
    assert mistakes.too_wide(TEXTS.read_text(encoding="utf-8")) == []


if __name__ == "__main__":
    TEXTS.write_text(texts(), encoding="utf-8")
    sys.stdout.write(TEXTS.read_text(encoding="utf-8"))
