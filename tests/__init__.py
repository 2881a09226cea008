"""The whole suite. A package, so that `tests.servers` is this one and no other."""
