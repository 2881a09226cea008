"""A Hugging Face hub for tests, with its CDN on a second port and faults on demand. See HubServer."""

from __future__ import annotations

import http.client
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import msgspec

from tests.servers.netns import Host
from tests.servers.ports import free_ports
from tests.servers.process import ServerProcess, answers

_T = TypeVar("_T")
Kind = Literal["status", "latency", "blackhole", "reset", "cut", "stall", "range", "whole", "corrupt", "bandwidth"]


class Request(msgspec.Struct, frozen=True):
    """One request that arrived. ``port``: "hub" or "cdn"; ``token``: what Authorization carried, None without;
    ``sent``: bytes of file bodies; ``status`` 0: never answered."""

    port: str
    method: str
    path: str
    query: str
    range: str | None
    token: str | None
    status: int
    sent: int


class HubServer:
    """``endpoint`` is what HF_ENDPOINT would be. Runs in a process of its own; a context manager.

    Publish directories as repositories; ask for faults; read what was requested:

        commit = hub.publish("org/model", directory)                     # files that end as LFS does in .gitattributes
        hub.publish("org/secret", directory, gated=True, tokens=["hf_x"])
        hub.fault("status", port="cdn", status=503, headers={"Retry-After": "1"}, count=3)
        hub.clear()                                                      # lifts all faults, frees what hangs
        assert not [r for r in hub.requests() if r.port == "cdn" and r.token]
    """

    def __init__(self, host: Host | None = None) -> None:
        """``host``: where it runs (tests/servers/netns.py); None = on this machine's loopback."""
        self._host = host
        self._published: list[dict[str, Any]] = []
        self.hub_port, self.cdn_port = free_ports(2) if host is None else (80, 81)
        self.address = "127.0.0.1" if host is None else host.address
        self.endpoint = f"http://{self.address}:{self.hub_port}"
        self.cdn_endpoint = f"http://{self.address}:{self.cdn_port}"
        self._process = self._start()

    def _start(self) -> ServerProcess:
        command = [sys.executable, "-m", "tests.servers.hub_server", f"--address={self.address}"]
        if self._host is not None:
            command = [*self._host.prefix, *command]
        process = ServerProcess([*command, f"--hub-port={self.hub_port}", f"--cdn-port={self.cdn_port}"])
        process.wait_ready(lambda: self._inside(self._answers), 20)
        return process

    def _answers(self) -> bool:
        return answers(self.hub_port, self.address) and answers(self.cdn_port, self.address)

    def _inside(self, work: Callable[[], _T]) -> _T:
        return work() if self._host is None else self._host.call(work)

    @property
    def pid(self) -> int:
        return self._process.pid

    def publish(
        self,
        repo: str,
        directory: str | os.PathLike[str],
        *,
        revision: str = "main",
        private: bool = False,
        gated: bool = False,
        tokens: tuple[str, ...] | list[str] = (),
        listers: tuple[str, ...] | list[str] = (),
    ) -> str:
        """Make ``revision`` of ``repo`` what lies in ``directory`` now; the commit. Earlier commits stay fetchable as
        long as their files lie where they lay: publish a changed model from another directory. ``listers``: tokens that
        may list it and not fetch from it."""
        order = {
            "do": "publish",
            "repo": repo,
            "directory": str(Path(directory).absolute()),
            "revision": revision,
            "private": private,
            "gated": gated,
            "tokens": list(tokens),
            "listers": list(listers),
        }
        self._published.append(order)
        return str(self._control(**order)["commit"])

    def publish_names(self, repo: str, names: list[str], real: str | os.PathLike[str]) -> str:
        """A repository that lists ``names`` (any, hostile ones too), each with the content of the file ``real``."""
        order = {
            "do": "publish-names",
            "repo": repo,
            "names": names,
            "real": str(real),
            "revision": "main",
            "private": False,
            "gated": False,
            "tokens": [],
            "listers": [],
        }
        self._published.append(order)
        return str(self._control(**order)["commit"])

    def fault(
        self,
        kind: Kind,
        *,
        port: Literal["hub", "cdn", "any"] = "any",
        path: str = "",
        method: str = "",
        count: int | None = None,
        probability: float = 1.0,
        seed: int = 0,
        status: int = 503,
        headers: dict[str, str] | None = None,
        after: int = 0,
        seconds: float = 0.0,
        rate: int = 0,
    ) -> None:
        """From now on, requests to ``port`` whose path holds ``path`` meet this fault, ``count`` times (None: until
        ``clear``), each with ``probability`` (of a generator with ``seed``).

        status: answer ``status`` with ``headers`` · latency: ``seconds`` first · blackhole: never answer · reset: close
        at once · cut: close after ``after`` bytes of the body · stall: fall silent after ``after`` bytes · range: a
        Content-Range that is off by one · whole: ignore Range, 200 · corrupt: flip one byte of each body ·
        bandwidth: ``rate`` bytes per second.
        """
        self._control(
            do="fault",
            kind=kind,
            port=port,
            path=path,
            method=method,
            count=count,
            probability=probability,
            seed=seed,
            status=status,
            headers=headers or {},
            after=after,
            seconds=seconds,
            rate=rate,
        )

    def clear(self) -> None:
        """Lift all faults."""
        self._control(do="clear")

    def expire_signatures(self) -> None:
        """Every CDN address handed out so far answers 403 from now on."""
        self._control(do="expire")

    def configure(
        self,
        *,
        lifetime: float | None = None,
        page: int | None = None,
        siblings: int | None = None,
        drop: list[str] | None = None,
    ) -> None:
        """``lifetime``: seconds of a CDN signature (3600); ``page``: entries per page of a tree (1000); ``siblings``:
        how many files a repository's description names (all).

        ``drop``: what a bad mirror leaves out. blobs: sizes and oids of the description · sizes: those of the tree ·
        tree: all of it (404) · link: the address of the next page · link-host: the right host of it · cursor: its
        progress.
        """
        wanted = {"lifetime": lifetime, "page": page, "siblings": siblings, "drop": drop}
        self._control(do="set", **{name: value for name, value in wanted.items() if value is not None})

    def requests(self, port: str | None = None) -> list[Request]:
        """What arrived, in order, control requests left out."""
        found = msgspec.convert(self._control(do="requests"), list[Request])
        return [request for request in found if port is None or request.port == port]

    def forget_requests(self) -> None:
        self._control(do="forget-requests")

    def reset(self) -> None:
        """No faults, no log, default settings; published repositories stay."""
        self.clear()
        self.forget_requests()
        self.configure(lifetime=3600, page=1000, siblings=10**9, drop=[])

    def pause(self) -> None:
        """SIGSTOP: the kernel still accepts, nobody answers."""
        self._process.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.signal(signal.SIGCONT)

    def kill(self) -> None:
        """The hub and its CDN are gone: connections are refused."""
        self._process.kill()

    def restart(self) -> None:
        """Back after ``kill``, on the same ports, with the same repositories."""
        self._process.kill()
        self._process = self._start()
        for order in self._published:
            if os.path.exists(order.get("directory") or order["real"]):  # a test that has passed took its files with it
                self._control(**order)

    def close(self) -> None:
        self._process.kill()

    def _control(self, **order: Any) -> Any:
        return self._inside(lambda: self._ask(order))

    def _ask(self, order: dict[str, Any]) -> Any:
        connection = http.client.HTTPConnection(self.address, self.hub_port, timeout=120)
        try:
            connection.request("POST", "/_control", json.dumps(order), {"Content-Type": "application/json"})
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise RuntimeError(f"the test hub refuses {order}: {body.decode()}")
        return json.loads(body)

    def __enter__(self) -> HubServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
