"""The regional tier: the storage that the hosts of a region share, and what they leave there for one another."""
