"""What is shown of pipelines and files: attributes, xattrs, names, status. It changes nothing."""
