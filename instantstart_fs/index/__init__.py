"""The index: durable records of presence, nodeids, requests and access times, in LMDB with one writer thread. It can
be rebuilt from the slots."""
