"""Says which errno a process sees for each error of the tree: one dict, one row for every class. It raises nothing.

EIO is what every engine understands as "the bytes could not be had". ENOENT is kept for what truly has no name: engines
probe for optional files, and an origin's 404 shown as ENOENT would make them load half a model. ESTALE is what a node
that no longer exists says, since the kernel then looks the path up again.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Final

from instantstart_fs import errors

ERRNO: Final[Mapping[type[errors.InstantStartError], int]] = {
    errors.InstantStartError: errno.EIO,
    errors.UsageError: errno.EINVAL,
    errors.ConfigError: errno.EINVAL,
    errors.InvalidName: errno.EINVAL,
    errors.InvalidSource: errno.EINVAL,
    errors.NoSuchEntry: errno.ENOENT,
    errors.PipelineNotFound: errno.ENOENT,
    errors.PipelineExists: errno.EEXIST,
    errors.PipelineBusy: errno.EBUSY,
    errors.NoColdStart: errno.ENOENT,
    errors.VariantNotChosen: errno.EINVAL,
    errors.OriginError: errno.EIO,
    errors.OriginUnavailable: errno.EIO,
    errors.OriginThrottled: errno.EIO,
    errors.OriginMisbehaved: errno.EIO,
    errors.LocationExpired: errno.EIO,
    errors.OriginBroken: errno.EIO,
    errors.AccessRefused: errno.EACCES,
    errors.CredentialsUnusable: errno.EACCES,
    errors.OriginNotFound: errno.EIO,
    errors.OriginHidden: errno.EIO,
    errors.OriginChanged: errno.EIO,
    errors.OriginIncompatible: errno.EIO,
    errors.OriginUnsupported: errno.EIO,
    errors.StoreError: errno.EIO,
    errors.StoreFull: errno.ENOSPC,
    errors.StoreReadOnly: errno.EIO,  # EROFS would speak of the mount, where the caller only read
    errors.StoreLocked: errno.EIO,
    errors.StoreUnsupported: errno.EIO,
    errors.StoreDamaged: errno.EIO,
    errors.StoreLost: errno.EIO,
    errors.OutOfResources: errno.ENFILE,  # EMFILE would send its reader to look at its own limit
    errors.OutOfMemory: errno.ENOMEM,
    errors.IndexFull: errno.ENOSPC,
    errors.IndexStuck: errno.EIO,
    errors.DigestMismatch: errno.EIO,
    errors.ReadDeadline: errno.EIO,
    errors.FillCancelled: errno.EIO,
    errors.FetchWorkersFailed: errno.EIO,
    errors.MountFailed: errno.EIO,
    errors.PrefetchError: errno.EIO,
    errors.BadWeights: errno.EIO,
    errors.OutOfBudget: errno.ENOMEM,
    errors.ControlError: errno.EIO,
    errors.DaemonUnreachable: errno.EIO,
    errors.WaitDeadline: errno.EIO,
    errors.ControlProtocolError: errno.EIO,
    errors.PermissionRefused: errno.EPERM,
}


def errno_of(error: errors.InstantStartError, *, missing: int = errno.ENOENT) -> int:
    """The errno for ``error``; ``missing`` is what NoSuchEntry means to the caller (ENOENT for names, ESTALE for
    nodes).

    A class without a row of its own (one defined elsewhere) takes that of its nearest ancestor.
    """
    if isinstance(error, errors.NoSuchEntry):
        return missing
    for cls in type(error).__mro__:
        if cls in ERRNO:
            return ERRNO[cls]
    return errno.EIO
