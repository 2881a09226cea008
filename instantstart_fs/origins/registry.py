"""Opens the origin for a source address. Only this module knows all origins.

Opening does no IO and reads no credentials, so it cannot fail on either: a warm pipeline must start while its origin is
unreachable and no credentials are at hand. huggingface_hub and boto3 are imported when first used.
"""

from __future__ import annotations

from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.core.source import DirectorySource, HubSource, S3Source, parse_source
from instantstart_fs.origins.base import Origin
from instantstart_fs.origins.settings import OriginSettings

__all__ = ["OriginSettings", "open_origin"]


def open_origin(spec: PipelineSpec, model: ModelSpec, settings: OriginSettings) -> Origin:
    """The origin of one model, with the credentials of its pipeline and of no other. Raises InvalidSource.

    ``spec.endpoint_url`` is S3's; a hub's endpoint is a setting of the machine (or HF_ENDPOINT).
    """
    source = parse_source(model.source)
    match source:
        case HubSource():
            from instantstart_fs.origins.huggingface import HuggingFaceOrigin

            return HuggingFaceOrigin(
                source,
                model,
                endpoint=settings.huggingface.endpoint,
                token_file=None if spec.anonymous else spec.token_file or settings.huggingface.token_file,
                timeout=settings.timeout,
                bounds=settings.bounds,
                allow_private=settings.allow_private,
                anonymous=spec.anonymous,
            )
        case S3Source():
            from instantstart_fs.origins.s3 import S3Origin

            # A pipeline's own profile is more than the machine's "ask without".
            anonymous = spec.anonymous or (settings.s3.anonymous and not spec.aws_profile)
            return S3Origin(
                source,
                model,
                endpoint_url=spec.endpoint_url or settings.s3.endpoint_url,
                region_name=settings.s3.region_name,
                profile=None if anonymous else spec.aws_profile or settings.s3.profile,
                timeout=settings.timeout,
                bounds=settings.bounds,
                anonymous=anonymous,
                requester_pays=spec.requester_pays or settings.s3.requester_pays,
                etags_are_md5=settings.s3.etags_are_md5,
                allow_private=settings.allow_private,
            )
        case DirectorySource():
            from instantstart_fs.origins.directory import DirectoryOrigin

            return DirectoryOrigin(source, model)
