"""The configuration file with every key at its default, for `instantstart config init` and docs/CONFIGURATION.md."""

from __future__ import annotations

import re

TEMPLATE = r"""region = "local"                  # a name for this machine's place; no effect yet

[mount]
path = "/models"
transport = "auto"                # "auto" | "passthrough" | "bind" | "pyfuse3"; see below

[store]
path = "/var/lib/instantstart"    # ext4 or xfs; not within the mount, nor the mount within it
capacity = "80%"                  # of its filesystem, or a size ("500GiB")
low_watermark = 0.85              # fractions of the capacity: eviction begins above the high one
high_watermark = 0.95             # and goes down to the low one
min_free = "2%"                   # of the filesystem, or a size, or 0: stays free for its other users
scrub = "off"                     # or how often every complete file is read again and compared ("30d"); see below
scrub_rate = "50MB"               # a second, at most; at least 1MB

[fill]
workers = "auto"                  # fetch processes: one per core, at least 2, at most 4; or a number
connections = 16                  # to each origin, over all workers
chunk_size = "8MiB"               # a multiple of 4 KiB; holds for pipelines and generations resolved from then on
read_deadline = "60s"             # a read without progress for so long fails with EIO; at least 100ms
serve_unsealed = "auto"           # "auto" | "always" | "never": may bytes be read before the whole file is proven?

[eviction]
keep_hot = "48h"                  # requested within it: never evicted
# max_idle = "7d"                 # not requested for so long: evicted though there is space; at least keep_hot

[staging]                         # reading ahead into the page cache while an engine loads a pipeline
enabled = true
threads = 4                       # of the staging process; each has 8 MiB of reading under way
max_memory = "50%"                # of the memory that is available (MemAvailable), or a size; never more than 80 % of
                                  # what any memory cgroup around the daemon has left

[http]                            # page, metrics and health; see below
listen = "127.0.0.1:9847"         # IP address and port (0: any free one), or "off"
details = false                   # show sources, revisions and error messages too
allow_remote = false              # must be true for an address that other machines reach
hosts = []                        # names under which it may be called, beside localhost; ["*"]: any
public = false                    # true: every caller sees every pipeline, not only what the mount would show him
# token_file = "/etc/instantstart/page-token"   # the bearer of this token sees every pipeline: for scrapers
# api_token_file = "/etc/instantstart/api-token"   # the bearer of this other token administers over TCP (docs/HTTP.md)
# socket = "/run/instantstart/page.sock"        # be served on this unix socket as well
metrics_pipelines = 200           # pipelines that get metrics of their own: those requested last

[control]
# group = "ml-admins"             # name or gid: its members administer, as root does (docs/SECURITY.md)
group_access = false              # may members of a pipeline's own group do what its owner may?

[origins]
recheck_access = "off"            # or how often each pipeline's credentials are tried again ("24h"); see below
allow_private = []                # private hosts, addresses, networks that an origin may send us to; see below
on_refusal = "hide"               # "hide": what its origin refuses goes out of view | "report": it is only told of

[origins.huggingface]             # not set: HF_ENDPOINT, HF_TOKEN and huggingface_hub's own files
# endpoint = "https://huggingface.co"    # may hold user:password, but not beside a token file
# token_file = "/etc/instantstart/hub-token"

[origins.s3]                      # not set: AWS_* and ~/.aws, as boto3 reads them
# endpoint_url = "http://127.0.0.1:8333"
# region_name = "eu-central-1"
# profile = "models"
anonymous = false                 # ask every bucket without credentials, unless a pipeline has an aws_profile
requester_pays = false            # these credentials pay for the requests
etags_are_md5 = true              # false: this engine's ETags only look like MD5s; without a checksum: unverified
"""
_HEAD = """\
# Instant Start FS, made by `instantstart config init`. Every key is shown with its default; remove the # before one to
# set it. `instantstart config check` says whether it is right. All keys: docs/CONFIGURATION.md.

"""


def commented(mount: str, store: str) -> str:
    """The template for a user whose defaults are ``mount`` and ``store``, with every key commented out."""
    text = TEMPLATE.replace('"/models"', f'"{mount}"').replace('"/var/lib/instantstart"', f'"{store}"')
    return _HEAD + re.sub(r"(?m)^(?=[a-z0-9_]+ = )", "# ", text)
