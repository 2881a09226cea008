"""Which pipeline a path belongs to, by the table of mounts."""

from __future__ import annotations

from pathlib import Path

import pytest

from instantstart_fs.prefetch.mounts import pipeline_of

HOST = """\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
40 22 0:50 / /models ro,nosuid,nodev shared:5 - fuse.instantstart instantstart ro,user_id=0
41 40 254:0 /var/lib/instantstart/slots/bound/1/files /models/bound ro - ext4 /dev/vda rw
42 22 0:51 / /mnt/my\\040models ro - fuse.instantstart instantstart ro
"""
CONTAINER = """\
22 1 0:40 / / rw - overlay overlay rw
40 22 0:50 /my-llm /weights ro - fuse.instantstart instantstart ro
41 22 0:50 /voice/asr /asr ro - fuse.instantstart instantstart ro
"""


@pytest.mark.parametrize(
    ("table", "path", "expected"),
    [
        (HOST, "/models/my-llm", ("my-llm", "")),
        (HOST, "/models/my-llm/model-00001.safetensors", ("my-llm", "model-00001.safetensors")),
        (HOST, "/models/voice/asr/x.safetensors", ("voice", "asr/x.safetensors")),
        (HOST, "/models/bound/a.safetensors", ("bound", "a.safetensors")),
        (HOST, "/mnt/my models/p/f", ("p", "f")),
        (HOST, "/models", None),
        (HOST, "/modelsx/my-llm", None),
        (HOST, "/home/me/model", None),
        (CONTAINER, "/weights/a.safetensors", ("my-llm", "a.safetensors")),
        (CONTAINER, "/weights", ("my-llm", "")),
        (CONTAINER, "/asr/a.safetensors", ("voice", "asr/a.safetensors")),
    ],
)
def test_the_pipeline_of_a_path(table: str, path: str, expected: tuple[str, str] | None) -> None:
    assert pipeline_of(path, lambda: table) == expected


def test_links_are_followed(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("/models/my-llm")
    assert pipeline_of(str(link), lambda: HOST) == ("my-llm", "")
