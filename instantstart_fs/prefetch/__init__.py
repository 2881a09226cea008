"""Loads weights straight into the memory of the devices that need them, while the engine is still importing.

    layout    safetensors header → where each tensor lies (pure)
    plan      which files go to which device, in which order (pure)
    sources   where descriptors of the files come from: a daemon's lease, or a directory
    backends  how bytes get from a file into a device's memory
    worker    the process that does it, one for each device
    stager    starts workers, feeds them, keeps account: Stager, Stage
    start     all of a pipeline, staged by one call
    holder    a Stage kept for engines, which take it file by file
    state_dict  load_state_dict, for engines without a plugin
    vllm_loader  vLLM's plugin; imported by vLLM alone

The daemon never imports this package. It needs neither torch nor CUDA to be imported; torch is loaded where tensors are
made, and in the workers of CUDA devices.
"""

from instantstart_fs.prefetch.layout import FileLayout, TensorLayout, read_layout
from instantstart_fs.prefetch.plan import DevicePlan, Plan, PlannedFile, plan
from instantstart_fs.prefetch.sources import DirectorySource, LeaseSource, OpenedFile, Source
from instantstart_fs.prefetch.staged import DeviceReport, Exported
from instantstart_fs.prefetch.stager import Stage, Stager
from instantstart_fs.prefetch.state_dict import load_state_dict

__all__ = [
    "DevicePlan",
    "DeviceReport",
    "DirectorySource",
    "Exported",
    "FileLayout",
    "LeaseSource",
    "OpenedFile",
    "Plan",
    "PlannedFile",
    "Source",
    "Stage",
    "Stager",
    "TensorLayout",
    "load_state_dict",
    "plan",
    "read_layout",
]
