"""Says what an error of CUDA means, and why there is no device: torch names the error, and neither cause nor remedy."""

from __future__ import annotations

import os
from typing import Any

VISIBLE = "CUDA_VISIBLE_DEVICES"

_MEANINGS = (
    ("uncorrectable ecc", "the GPU's memory is damaged, and what it holds is lost; `nvidia-smi -q -d ECC` tells more"),
    (
        "busy or unavailable",
        "another process has this GPU for itself (compute mode Exclusive_Process or Prohibited); helper and engine need"
        " it both: `nvidia-smi -c DEFAULT`",
    ),
    ("driver on your system is too old", "the driver is older than this build of torch needs"),
    ("driver version is insufficient", "the driver is older than this build of torch needs"),
    ("system not yet initialized", "the driver is not ready: on machines with NVSwitch its fabric manager must run"),
    ("driver / cuda driver combination", "the driver's library and its kernel module are of different releases"),
    ("forward compatibility", "the driver's library (cuda-compat?) does not fit this GPU"),
    ("fallen off the bus", "the GPU is lost until the machine is restarted; the kernel's log has an Xid"),
    ("gpu is lost", "the GPU is lost until the machine is restarted; the kernel's log has an Xid"),
    ("illegal memory access", "the GPU stopped this process; the kernel's log (`dmesg | grep Xid`) says why"),
    ("unspecified launch failure", "the GPU stopped this process; the kernel's log (`dmesg | grep Xid`) says why"),
    ("hardware stack error", "the GPU stopped this process; the kernel's log (`dmesg | grep Xid`) says why"),
    ("over nvlink or a hardware error", "the GPU stopped this process; the kernel's log (`dmesg | grep Xid`) says why"),
    ("cuda error: unknown error", "the driver has failed; the kernel's log (`dmesg | grep -i nvrm`) says why"),
    ("mps client failed", "the control daemon of CUDA's MPS does not answer"),
    ("not compiled with cuda", "this build of torch is one for the CPU"),
    ("no kernel image is available", "this build of torch has no code for this GPU: it is too old, or too new, for it"),
    (
        "error 304",
        "the driver's device files cannot be used here: a container needs them passed in (`--gpus all`), and among them"
        " /dev/nvidia-uvm",
    ),
    ("error 999", "the driver has failed; the kernel's log (`dmesg | grep -i nvrm`) says why"),
)
"""(what the error holds, in lower case; what it means). The words are those of cudaGetErrorString and of torch."""

_NO_OWNER = (
    "the process that owns it has ended, or is in another container: CUDA needs one IPC and one PID namespace for both,"
    " `--ipc=host --pid=host`"
)
_OPENING = (
    ("invalid resource handle", _NO_OWNER),
    ("invalid device context", _NO_OWNER),
    ("mapping of buffer object", f"{_NO_OWNER}, or its memory does not fit this process"),
    (
        "pidfd_",
        "its owner's torch hands memory over by descriptors (expandable segments), which this process may not take",
    ),
    ("cudamallocasync does not", "this process uses the allocator cudaMallocAsync, which opens no other one's memory"),
    (
        "operation not supported",
        "this GPU does not let processes share memory: as between instances of MIG, or in some virtual machines",
    ),
    ("peer access is not supported", "it lies on a GPU that this one cannot reach"),
    ("peer mapping resources exhausted", "this GPU is connected to as many others as it can be"),
)
"""The same, of errors from opening another process's memory."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error: torch adds advice for who debugs kernels."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def meaning(text: str, *, opening: bool = False) -> str:
    """Return what an error's line means; empty if that is not known.

    Args:
        opening: whether another process's memory was being opened.
    """
    lower = text.lower()
    return next((means for words, means in (*(_OPENING if opening else ()), *_MEANINGS) if words in lower), "")


def explained(error: BaseException, *, opening: bool = False) -> str:
    """Return the first line of the error, with what it means where that is known."""
    line = first_line(error)
    means = meaning(line, opening=opening)
    return f"{line} ({means})" if means else line


def no_device(torch: Any) -> str:
    """Return why this torch finds no device, in words that go on "finds no CUDA device here". It does not fail."""
    try:
        torch.cuda.init()  # is_available() swallows the reason
    except Exception as error:
        reason = explained(error)
    else:
        reason = ""
    return "; ".join(filter(None, (reason, visible())))


def visible() -> str:
    """Return which devices the environment leaves to this process, in words; empty where it says nothing."""
    value = os.environ.get(VISIBLE)
    return "" if value is None else f"{VISIBLE} is {value!r}"
