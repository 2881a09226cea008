"""vLLM's loader of prefetched weights: `vllm serve /models/PIPELINE --load-format instantstart`.

vLLM calls ``register`` in each of its processes (entry point group ``vllm.general_plugins``). The loader takes what
`instantstart prefetch PIPELINE --hold` keeps, frees it file by file as vLLM copies it into its parameters, and loads
from the mount, with one line in the log that says why, whatever does not fit.

It overrides ``DefaultModelLoader._get_weights_iterator``, which is private: made for vLLM 0.32 and 0.33, and tested by
tests/engine/test_vllm.py.
"""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator

from instantstart_fs.errors import InstantStartError, PrefetchError
from instantstart_fs.prefetch.hold_client import HoldClient
from instantstart_fs.prefetch.hold_protocol import HeldFile
from instantstart_fs.prefetch.mounts import pipeline_of
from instantstart_fs.prefetch.state_dict import take
from instantstart_fs.prefetch.tensors import place_of

log = logging.getLogger("vllm.instantstart")
"""Below vLLM's own logger, so that its lines appear among vLLM's."""

DIGEST = "user.instantstart.digest"
GENERATION = "user.instantstart.generation"


def register() -> None:
    register_model_loader("instantstart")(InstantStartLoader)


class InstantStartLoader(DefaultModelLoader):  # type: ignore[misc]  # vLLM is not installed where types are checked
    def __init__(self, load_config: Any) -> None:
        # Everything but where the bytes come from is as with "auto".
        load_config = copy.copy(load_config)
        load_config.load_format = "auto"
        super().__init__(load_config)
        self._held: HoldClient | None = None

    def get_external_weight_memory(self, vllm_config: Any) -> int:
        """Bytes of this GPU that vLLM must not count on at its start, since the weights still lie there in the holder.

        They are freed as vLLM loads, unlike the memory that this hook was made for: so only as much is named as vLLM's
        own check of the free memory lacks, and the KV cache is not made smaller than it has to be.
        """
        if not torch.cuda.is_available():
            return 0
        try:
            with _connected(vllm_config.model_config.model) as held:
                place = place_of(f"cuda:{torch.cuda.current_device()}")
                kept = sum(file.size for file in held.manifest().files if file.place == place)
        except InstantStartError:
            return 0
        free, total = torch.cuda.mem_get_info()
        wanted = math.ceil(total * float(vllm_config.cache_config.gpu_memory_utilization))
        return min(kept, max(0, wanted - int(free)))

    def _get_weights_iterator(self, source: Any) -> Iterator[tuple[str, torch.Tensor]]:
        try:
            files = self._match(source)
        except (InstantStartError, OSError) as error:
            log.warning("instantstart: loading from the mount: %s", error)
            iterator: Iterator[tuple[str, torch.Tensor]] = super()._get_weights_iterator(source)
            return iterator
        return ((source.prefix + name, tensor) for name, tensor in self._handed_over(files))

    def _match(self, source: Any) -> list[tuple[str, HeldFile]]:
        """(file on the mount, the same among the held) of all that vLLM wants. Raises what keeps it from that."""
        _, found, is_safetensors, _ = self._prepare_weights(
            source.model_or_path,
            source.subfolder,
            source.revision,
            source.fall_back_to_pt,
            source.allow_patterns_overrides,
        )
        if not is_safetensors:
            raise PrefetchError("the checkpoint is not in safetensors")
        if self._held is None:
            self._held = _connected(source.model_or_path)
        manifest = self._held.manifest()
        held = {file.path: file for file in manifest.files}
        matched = []
        for location in found:
            inside = pipeline_of(location)
            file = held.get(inside[1]) if inside else None
            if file is None:
                raise PrefetchError(f"{location} is not held")
            # Sources without digests have files that differ in nothing but their generation.
            same = _attribute(location, GENERATION) == str(manifest.generation)
            if not same or file.size != os.stat(location).st_size or file.digest != _attribute(location, DIGEST):
                raise PrefetchError(f"{location} is not the file that is held (an update came between)")
            matched.append((location, file))
        return matched

    def _handed_over(self, files: list[tuple[str, HeldFile]]) -> Iterator[tuple[str, torch.Tensor]]:
        assert self._held is not None
        taken = 0
        # Of a file that another rank's GPU holds, this rank copies its slices from there: by its own device's context.
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        for position, (_, file) in enumerate(files):
            try:
                tensors = take(self._held, file.path, device=device)
            except InstantStartError as error:
                log.warning("instantstart: loading %d files from the mount: %s", len(files) - position, error)
                yield from safetensors_weights_iterator(
                    [location for location, _ in files[position:]],
                    self.load_config.use_tqdm_on_load,
                    self.load_config.safetensors_load_strategy,
                    local_expert_ids=self.local_expert_ids,
                )
                return
            used = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
            yield from tensors.items()
            for seen in used | {torch.device("cuda", torch.cuda.current_device())} if used else ():
                torch.cuda.synchronize(seen)  # vLLM's copies out of this memory have to be done before it is freed
            taken += file.size
            del tensors
            try:
                self._held.release_file(file.path)
            except InstantStartError as error:
                log.warning("instantstart: %s", error)  # it is in place already; the next take tells what to do
        log.info("instantstart: took %d bytes in %d files from the prefetch helper", taken, len(files))


def _connected(path: str) -> HoldClient:
    inside = pipeline_of(path)
    if inside is None:
        raise PrefetchError(f"{path} lies on no instantstart mount")
    return HoldClient(inside[0])


def _attribute(location: str, name: str) -> str | None:
    try:
        return os.getxattr(location, name).decode()
    except OSError:
        return None
