"""The servers that the benches fetch from. Bodies come from nginx (sendfile) wherever an origin allows it, so that the
origin is not what is measured: the test hub redirects to nginx as its CDN. SeaweedFS serves S3. Both sides of a
comparison use the same server.

``python -m bench.origins --hub-port P --cdn-port Q``: the hub's process, with $BENCH_CDN as its CDN.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from bench.common import Model, wait_for
from tests.servers.hub import HubServer
from tests.servers.nginx import nginx_program
from tests.servers.ports import free_port
from tests.servers.process import ServerProcess, answers

_NGINX = """
{user} daemon off; pid {run}/nginx.pid; error_log stderr warn; worker_processes {workers};
events {{ worker_connections 1024; }}
http {{
  access_log off; sendfile on; tcp_nopush on; tcp_nodelay on; keepalive_requests 1000000; keepalive_timeout 300;
  default_type application/octet-stream;
  client_body_temp_path {run}/t1; proxy_temp_path {run}/t2; fastcgi_temp_path {run}/t3; uwsgi_temp_path {run}/t4;
  scgi_temp_path {run}/t5;
  server {{ listen 127.0.0.1:{port} backlog=1024; root "{root}"; autoindex on; }}
}}
"""


@contextlib.contextmanager
def nginx(directory: Path, root: Path, *, workers: int = 2) -> Iterator[str]:
    """Serve ``root``; gives the base address. tests.servers.nginx with more processes, and with the listings that
    rclone's http backend asks for."""
    program = nginx_program()
    if program is None:
        raise RuntimeError("nginx is not installed (Debian: nginx-light)")
    directory.mkdir(parents=True, exist_ok=True)
    port = free_port()
    conf = directory / "nginx.conf"
    user = "user root;" if os.geteuid() == 0 else ""
    conf.write_text(_NGINX.format(run=directory, port=port, root=root, workers=workers, user=user))
    server = ServerProcess([program, "-c", str(conf), "-p", str(directory), "-e", "stderr"])
    try:
        server.wait_ready(lambda: answers(port), 15.0)
        yield f"http://127.0.0.1:{port}"
    finally:
        # SIGTERM and not SIGKILL: nginx' worker processes outlive a killed master.
        server.signal(15)
        wait_for(lambda: not server.alive, "nginx' end", 10.0)
        server.kill()


class HubWithNginx(HubServer):
    """The test hub, whose redirects lead to nginx."""

    def __init__(self, cdn: str) -> None:
        self._cdn = cdn
        super().__init__()

    def _start(self) -> ServerProcess:
        command = [sys.executable, "-m", "bench.origins", f"--hub-port={self.hub_port}", f"--cdn-port={self.cdn_port}"]
        process = ServerProcess(command, env={"BENCH_CDN": self._cdn})
        process.wait_ready(lambda: answers(self.hub_port), 20)
        return process


@contextlib.contextmanager
def hub(directory: Path, models: dict[str, Model]) -> Iterator[tuple[HubWithNginx, str]]:
    """(the hub, nginx' address) serving ``models`` by repository name. nginx shows every file as /REPO/NAME too."""
    root = directory / "cdn"
    for repo, model in models.items():
        (root / repo).parent.mkdir(parents=True, exist_ok=True)
        (root / repo).symlink_to(model.directory)
        for path in model.shards:
            digest = model.digests[path.name]
            place = root / "repos" / digest[:2] / digest[2:4]
            place.mkdir(parents=True, exist_ok=True)
            (place / digest).symlink_to(path)
    with nginx(directory / "nginx", root) as cdn, HubWithNginx(cdn) as server:
        for repo, model in models.items():
            server.publish(repo, model.directory)
        yield server, cdn


def have(program: str) -> bool:
    return shutil.which(program) is not None


def main() -> None:
    from tests.servers import hub_server

    parser = argparse.ArgumentParser()
    parser.add_argument("--hub-port", type=int, required=True)
    parser.add_argument("--cdn-port", type=int, required=True)
    ports = parser.parse_args()
    state = hub_server.State()
    server = hub_server.Server(ports.hub_port, "hub", state)
    state.hub = f"http://127.0.0.1:{ports.hub_port}"
    state.cdn = os.environ["BENCH_CDN"]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
