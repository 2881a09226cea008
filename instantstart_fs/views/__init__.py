"""The outside view of pipelines and files: attributes, xattrs, names, status. This package changes nothing."""
