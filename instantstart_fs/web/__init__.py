"""The page, the metrics and the health answer, over HTTP. Read-only; it asks the library and changes nothing."""
