"""What hosts of a Network know of a tier's S3 engine: a gateway among them, and two keys."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from tests.servers.netns import Host
from tests.servers.seaweed import environment_for

S3 = 8333


class S3Tier:
    """``endpoint_url``, ``access_key``, ``secret_key``; ``client()`` is a boto3 S3 client that runs on the gateway."""

    def __init__(self, gateway: Host, access_key: str, secret_key: str) -> None:
        self.gateway, self.access_key, self.secret_key = gateway, access_key, secret_key
        self.endpoint_url = f"http://{gateway.address}:{S3}"

    @property
    def environment(self) -> dict[str, str]:
        """AWS_* variables with which any S3 client on a host finds its way here."""
        return environment_for(self.endpoint_url, self.access_key, self.secret_key)

    def client(self, *, attempts: int = 3) -> _Client:
        return _Client(self, attempts)

    def new_bucket(self, name: str) -> str:
        with self.client() as client:
            client.create_bucket(Bucket=name)
        return name

    def objects(self, bucket: str, prefix: str = "") -> dict[str, int]:
        """Size by key."""
        found: dict[str, int] = {}
        with self.client() as client:
            start = ""
            while True:
                page = client.list_objects_v2(Bucket=bucket, Prefix=prefix, StartAfter=start)
                entries = page.get("Contents", ())
                found.update({entry["Key"]: entry["Size"] for entry in entries})
                if not page.get("IsTruncated"):
                    return found
                start = entries[-1]["Key"]

    def delete(self, bucket: str, key: str) -> None:
        with self.client() as client:
            client.delete_object(Bucket=bucket, Key=key)

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Client:
    """A boto3 client whose every call is made on the gateway's host. Within ``with``: an object with its methods."""

    def __init__(self, cluster: S3Tier, attempts: int) -> None:
        import boto3
        from botocore.config import Config

        session = boto3.Session(aws_access_key_id=cluster.access_key, aws_secret_access_key=cluster.secret_key)
        config = Config(retries={"total_max_attempts": attempts}, connect_timeout=5, read_timeout=60)
        self._inner: Any = session.client(
            "s3", endpoint_url=cluster.endpoint_url, region_name="us-east-1", config=config
        )
        self._host = cluster.gateway

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)
        return lambda **arguments: self._host.call(lambda: method(**arguments))

    def __enter__(self) -> _Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inner.close()
