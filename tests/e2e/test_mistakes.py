"""What the commonest mistakes answer that a daemon has to hear of: tests/e2e/mistakes.txt, word for word.

After a change that is meant: INSTANTSTART_WRITE_MISTAKES=1 scripts/test tests/e2e/test_mistakes.py; read it aloud.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests import mistakes
from tests.harness import Daemon, model_directory
from tests.servers.hub import HubServer

TEXTS = Path(__file__).with_name("mistakes.txt")
MISTAKES = (
    "status my-lm",
    "status nothing",
    "status models/my-llm",
    "warm /mnt/models/my-lm --wait",
    "ls /mnt/models/my-llm/config.json",
    "ls 'no-*'",
    "warm my-lm --wait",
    "remove my-lm",
    "evict kept",
    "pin my-lm",
    "explain my-llm",
    "add my-llm org/other",
    "add Big/Model org/other",
    "add new org/misspelt",
    "add new org/model@no-such-branch",
    "add new org/gated",
    "add new org/gated --token-file wrong-token",
    "add new file:///no/such/directory",
    "add new org/model --include '*.gguf'",
    "update my-llm",
    "warm small --wait",
    "mount org/model link",
    "lease my-lm -- true",
    "run my-lm -- true --json",
    "mark my-lm ready",
    "prefetch my-lm",
    "regional status my-llm",
    "startup-cache ls my-lm",
)


def texts(hub: HubServer) -> str:
    with mistakes.directory() as place:
        model = model_directory(place / "model", seed=1)
        hub.publish("org/model", model)
        hub.publish("org/other", model)
        hub.publish("org/gated", model, gated=True, tokens=["hf_right"])
        token = place / "wrong-token"
        token.touch(0o600)
        token.write_text("hf_wrong\n")
        (place / "link").symlink_to(model)
        config = {"origins": {"huggingface": {"endpoint": hub.endpoint}}}
        with Daemon(place, config=config, env={"HF_ENDPOINT": hub.endpoint}, allow=[r"."]) as daemon:
            daemon.ok("add", "my-llm", "org/model")
            daemon.ok("add", "kept", "org/model")
            daemon.ok("add", "small", "org/model", "--quota", "1MB")
            daemon.warm("kept")
            daemon.ok("pin", "kept")
            return mistakes.answers(MISTAKES, place, daemon.env, shown={hub.endpoint: "https://hub.example:443"})


def test_the_commonest_mistakes_are_answered_as_written() -> None:
    ending = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ()), [signal.getsignal(number) for number in ending]
    with HubServer() as hub:
        found = texts(hub)
    after = signal.pthread_sigmask(signal.SIG_BLOCK, ()), [signal.getsignal(number) for number in ending]
    assert after == before, "a mistake leaves signals as they were"
    if os.environ.get("INSTANTSTART_WRITE_MISTAKES") == "1":
        TEXTS.write_text(found, encoding="utf-8")
    assert found == TEXTS.read_text(encoding="utf-8")
    assert mistakes.too_wide(found) == []
