"""Values of ``PipelineStatus`` for tests that only show or send one."""

from __future__ import annotations

import msgspec

from instantstart_fs.core.status import PipelineStatus

COLD = PipelineStatus(
    pipeline="x",
    state="cold",
    cached_bytes=0,
    total_bytes=100,
    source=("hf://o/r",),
    generation=1,
    revision="abc",
    last_request=None,
    hot_until=None,
    pinned=False,
    leases=0,
    fill=None,
    error=None,
)


def pipeline_status(**changed: object) -> PipelineStatus:
    """A cold pipeline, but for what is ``changed``."""
    return msgspec.structs.replace(COLD, **changed)
