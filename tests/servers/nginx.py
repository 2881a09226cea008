"""nginx serving one directory with ranges: bodies at the speed of sendfile, for throughput benches."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from types import TracebackType

from tests.servers.ports import free_port
from tests.servers.process import ServerProcess, answers

_CONFIG = """
daemon off;
master_process off;
pid {work}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000;
    default_type application/octet-stream;
    client_body_temp_path {work}/body;
    proxy_temp_path {work}/proxy;
    fastcgi_temp_path {work}/fastcgi;
    uwsgi_temp_path {work}/uwsgi;
    scgi_temp_path {work}/scgi;
    server {{ listen 127.0.0.1:{port} backlog=1024; root "{root}"; }}
}}
"""


def nginx_program() -> str | None:
    """Where nginx is, None if it is not installed (Debian: nginx-light)."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/sbin")


class NginxServer:
    """Static files of ``root`` at ``url``. Must be readable by the user that runs this."""

    def __init__(self, root: str | Path) -> None:
        program = nginx_program()
        if program is None:
            raise RuntimeError("nginx is not installed")
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._work = tempfile.TemporaryDirectory(prefix="nginx-")
        config = Path(self._work.name) / "nginx.conf"
        user = "user root;\n" if Path(self._work.name).stat().st_uid == 0 else ""
        config.write_text(user + _CONFIG.format(work=self._work.name, port=self.port, root=root))
        self._process = ServerProcess([program, "-c", str(config), "-e", "stderr", "-p", self._work.name])
        self._process.wait_ready(lambda: answers(self.port), 10)

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        self._process.kill()
        self._work.cleanup()

    def __enter__(self) -> NginxServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
