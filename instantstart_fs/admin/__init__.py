"""Changes to pipelines on request: add, update, remove, evict, pin, verify. What happens without a request is in
``upkeep``."""
