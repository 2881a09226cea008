"""What is known of pipelines in memory: their generations and files, the nodeids that name them, and when
metadata is loaded and unloaded. It serves no bytes and asks no origin."""
