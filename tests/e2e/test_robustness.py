"""What an operator, a full machine or many clients at once do to a daemon: it goes on, or ends with a clear line."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from instantstart_fs.control.client import Client
from instantstart_fs.errors import InstantStartError
from tests.harness import Daemon


def test_500_clients_at_once_are_all_answered(make_daemon: Callable[..., Daemon], model: Path) -> None:
    daemon = make_daemon()
    daemon.ok("add", "m", f"file://{model}")
    start = threading.Barrier(500)
    failed: list[InstantStartError] = []

    def ask(number: int) -> None:
        start.wait(60)
        try:
            with Client(str(daemon.socket)) as client:
                if number % 2:
                    assert client.status("m").pipeline == "m"
                else:
                    client.touch("m")
        except InstantStartError as error:
            failed.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(500)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed, f"{len(failed)} of 500: {failed[0]}"
