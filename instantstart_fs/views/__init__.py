"""How pipelines and files look from outside: attributes, xattrs, names, status. Changes nothing."""
