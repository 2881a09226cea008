"""`instantstart csi` and `instantstart node-labels`: the node driver for Kubernetes, and the labels of its node."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from instantstart_fs.cli.options import Socket
from instantstart_fs.errors import UsageError

commands = typer.Typer()


@commands.command("csi")
def csi(
    endpoint: Annotated[
        str, typer.Option("--endpoint", envvar="CSI_ENDPOINT", metavar="unix:///PATH", help="Where the kubelet asks.")
    ] = "unix:///csi/csi.sock",
    node_id: Annotated[
        str, typer.Option("--node-id", envvar="NODE_NAME", metavar="NAME", help="The node's name in the cluster.")
    ] = "",
    state: Annotated[
        str,
        typer.Option("--state", metavar="DIR", help="What is published, and tokens; the daemon sees the same path."),
    ] = "/var/lib/instantstart-csi",
    kubelet: Annotated[
        str, typer.Option("--kubelet-dir", metavar="DIR", help="Targets outside of it are refused.")
    ] = "/var/lib/kubelet",
    node_credentials: Annotated[
        bool,
        typer.Option(
            "--node-credentials", help="Pods without a secret may use this node's own hub token and AWS credentials."
        ),
    ] = False,
    socket: Socket = None,
) -> None:
    """Serve a node's volumes to its kubelet (CSI; docs/KUBERNETES.md)."""
    path = _unix_path(endpoint)
    if not node_id or len(node_id) > 253:
        raise UsageError("--node-id is missing: the node's name in the cluster")
    try:
        from instantstart_fs.csi import server
    except ImportError as error:
        raise UsageError(f"grpcio and protobuf are missing ({error}): pip install 'instantstart-fs[csi]'") from error
    from instantstart_fs.config.places import find_socket
    from instantstart_fs.csi.driver import Driver

    _log()
    try:
        driver = Driver(find_socket(socket), state, kubelet, node_credentials=node_credentials)
        server.serve(driver, node_id, path)
    except OSError as error:
        raise UsageError(f"{error.filename or state}: {error.strerror or error}") from error


@commands.command("node-labels")
def node_labels(
    node: Annotated[str, typer.Option("--node", envvar="NODE_NAME", metavar="NAME", help="The node's name.")] = "",
    limit: Annotated[int, typer.Option("--limit", min=1, max=200, help="Labels at most.")] = 50,
    every: Annotated[float, typer.Option("--every", min=1, max=3600, metavar="SECONDS", help="Between looks.")] = 15,
    once: Annotated[bool, typer.Option("--once", help="Look once, and exit.")] = False,
    server: Annotated[str | None, typer.Option("--server", metavar="URL", help="The API (else the pod's).")] = None,
    account: Annotated[
        str, typer.Option("--service-account", metavar="DIR", help="Holds token and ca.crt.")
    ] = "/var/run/secrets/kubernetes.io/serviceaccount",
    socket: Socket = None,
) -> None:
    """Label this node with its warm pipelines: instantstart.io/warm.PIPELINE (docs/KUBERNETES.md)."""
    import signal
    import threading

    from instantstart_fs.config.places import find_socket
    from instantstart_fs.csi.node_labels import NodeApi, follow, update_once

    if not node:
        raise UsageError("--node is missing: the node's name in the cluster")
    api = NodeApi(node, server=server, account=account)
    path = find_socket(socket)
    if once:
        for key, value in update_once(path, api, limit).items():
            print(f"{key}={value}" if value is not None else f"{key} (removed)")
        return
    _log()
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    follow(path, api, limit, every, ended)


def _unix_path(endpoint: str) -> str:
    path = endpoint.removeprefix("unix://") if endpoint.startswith("unix:///") else endpoint.removeprefix("unix:")
    if not path.startswith("/") or len(os.fsencode(path)) > 107:
        raise UsageError(f"--endpoint {endpoint[:80]!r}: write unix:///PATH, with at most 107 bytes of path")
    return path


def _log() -> None:
    from instantstart_fs.logs import configure_logging

    configure_logging("info")
