"""Instant Start FS: a read-through mount that keeps model weights staged on NVMe.

``Client`` and ``AsyncClient`` talk to a daemon (docs/PYTHON.md). They are imported when they are first asked for: a
start of the daemon needs neither.
"""

__version__ = "0.2.0"
__all__ = ["AsyncClient", "Client", "InstantStartError", "__version__"]

TYPE_CHECKING = False  # the module itself takes 3 ms of every command
if TYPE_CHECKING:
    from instantstart_fs.client import Client
    from instantstart_fs.control.async_client import AsyncClient
    from instantstart_fs.errors import InstantStartError


def __getattr__(name: str) -> object:
    if name == "Client":
        from instantstart_fs.client import Client

        return Client
    if name == "AsyncClient":
        from instantstart_fs.control.async_client import AsyncClient

        return AsyncClient
    if name == "InstantStartError":
        from instantstart_fs.errors import InstantStartError

        return InstantStartError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
