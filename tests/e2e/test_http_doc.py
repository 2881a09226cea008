"""docs/HTTP.md: its blocks, in their order, as one script against a real daemon; then TCP."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness import REPOSITORY, Daemon, model_directory

KIB = 1024
TOKEN = "a-token-of-its-own-for-verbs"


def blocks() -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```$", (REPOSITORY / "docs" / "HTTP.md").read_text(), re.S | re.M)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_every_block_runs_and_over_tcp_the_token_alone_opens(
    make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    source = model_directory(tmp_path / "model", weights=(64 * KIB, 32 * KIB))
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    daemon = make_daemon(config={"http": {"listen": "127.0.0.1:0", "api_token_file": str(token)}})
    page = json.loads(curl(daemon, "http://localhost/v1/daemon"))["http"]
    found = blocks()
    assert len(found) == 7
    script = "\n".join(["set -e", *(f"echo '--- {at}'\n{block}" for at, block in enumerate(found))])
    environment = {"SOURCE": f"file://{source}", "PAGE": page, "TOKEN_FILE": str(token)}
    environment |= {"INSTANTSTART_SOCKET": str(daemon.socket)}
    end = time.monotonic() + 60
    while ask(f"{page}healthz") == 0 and time.monotonic() < end:
        time.sleep(0.05)  # the page's libraries are imported after the daemon is ready
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=100, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    _, asked, added, verified, leased, removed, missing, listed = re.split(r"--- \d\n", done.stdout)
    assert json.loads(asked)["mount"] == str(daemon.mount)
    states = [json.loads(line) for line in added.splitlines()]
    assert [one["pipeline"] for one in states[:3]] == ["my-llm"] * 3 and states[2]["state"] in ("warm", "unverified")
    assert [one["pipeline"] for one in states[3]] == ["my-llm"]
    assert json.loads(verified.splitlines()[-1])["type"] == "done"
    assert json.loads(leased) == {"type": "done", "result": None}
    assert [json.loads(line) for line in removed.splitlines()] == [[], []]
    assert json.loads(missing)["error"]["code"] == "pipeline-not-found"
    assert json.loads(listed) == []
    # Over TCP: the token alone, and no web page with it.
    verbs = f"{page}v1/pipelines"
    assert ask(verbs) == 401
    assert ask(verbs, Authorization="Bearer wrong-wrong-wrong-wrong") == 401
    right = {"Authorization": f"Bearer {TOKEN}"}
    assert ask(verbs, **right) == 200
    assert ask(verbs, Origin="http://localhost", **right) == 403
    assert ask(verbs, Host="evil.example", **right) == 400
    assert ask(f"{verbs}/x/pin", "POST") == 401
    assert ask(f"{verbs}/x/pin", "POST", **right) == 404
    assert ask(f"{page}openapi.json") == 200
    assert ask(page, "POST") == 405
    assert ask(f"{page}v1/placement/none") == 404


def curl(daemon: Daemon, *words: str) -> str:
    command = ["curl", "-sS", "--fail-with-body", "--unix-socket", str(daemon.socket), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def ask(url: str, method: str = "GET", **headers: str) -> int:
    """The status; 0 where nobody answers."""
    request = urllib.request.Request(url, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0
