"""Questions to Linux, and calls of it. This package knows no pipeline, no store and no mount of ours."""
