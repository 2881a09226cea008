"""A machine with little on it: no pyfuse3, no client of S3, no web server. A GPU machine without a network is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.daemon import daemon
from bench.gpu import make_checkpoint
from instantstart_fs.mount import kernel
from tests.harness import REPOSITORY

MISSING = "pyfuse3,boto3,botocore,awscrt,blake3,hypercorn,starlette,h2,wsproto"


@pytest.mark.skipif(kernel.why_no_passthrough() is not None, reason="no FUSE passthrough here")
def test_a_mount_by_passthrough_needs_neither_pyfuse3_nor_a_client_of_any_origin(tmp_path: Path) -> None:
    plain = tmp_path / "checkpoint"
    plain.mkdir()
    make_checkpoint(plain, 4 << 20, 2)
    paths = os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "tests/fake_cuda")))
    config = '[http]\nlisten = "off"\n\n[mount]\ntransport = "passthrough"\n\n[store]\nmin_free = "0"\n'
    bare = {"PYTHONPATH": paths, "INSTANTSTART_FAKE_MISSING": MISSING}
    with daemon(tmp_path, config=config, env=bare) as served:
        served.cli("add", "m", f"file://{plain}")
        served.cli("warm", "m", "--wait")
        mounted = served.mount / "m"
        assert sorted(path.name for path in mounted.iterdir()) == sorted(path.name for path in plain.iterdir())
        for path in plain.iterdir():
            assert (mounted / path.name).read_bytes() == path.read_bytes()
