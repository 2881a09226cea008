"""Background maintenance: eviction, scrub, access checks, rebuilding a lost index."""
