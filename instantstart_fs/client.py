"""`from instantstart_fs import Client`: the daemon's client, and what the machine of the caller does beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from instantstart_fs.control import client as control

if TYPE_CHECKING:
    from instantstart_fs.prefetch import Stage


class Client(control.Client):
    """The daemon at ``path`` (default: $INSTANTSTART_SOCKET, this user's, the machine's), and staging of weights."""

    def prefetch(
        self,
        pipeline: str,
        devices: str | Sequence[str] = "auto",
        *,
        tensor_parallel: int | None = None,
        backend: str = "auto",
        readers: int = 0,
        deadlines: Mapping[str, float] | None = None,
        what_fits: bool = False,
    ) -> Stage:
        """Bring a pipeline's weights into the memory of ``devices`` ("cuda:0", "cpu", several in a list; "auto": every
        GPU, else the CPU); a cold pipeline is filled meanwhile. Returns as soon as bytes are on their way.

        The other arguments are the options of `instantstart prefetch`; ``deadlines``: model → seconds. The Stage is a
        context manager with a lease and connections of its own, whatever becomes of this client. Raises
        PipelineNotFound, PermissionRefused, UsageError, OutOfBudget, PrefetchError.
        """
        from instantstart_fs.prefetch.plan import check_devices
        from instantstart_fs.prefetch.sources import LeaseSource
        from instantstart_fs.prefetch.start import every_device, start_stage

        named = every_device() if devices == "auto" else (devices,) if isinstance(devices, str) else tuple(devices)
        check_devices(named)  # before a cold pipeline is filled for nothing
        self._check_open()
        return start_stage(
            LeaseSource(pipeline, self.path, deadlines=deadlines),
            named,
            tensor_parallel=tensor_parallel,
            backend=backend,
            readers=readers,
            deadlines=deadlines,
            what_fits=what_fits,
        )
