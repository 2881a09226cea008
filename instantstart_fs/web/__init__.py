"""The page, the metrics and the health check, over HTTP. Read-only: it asks the library and changes nothing."""
