"""The regional tier: where hosts of a region meet, and what they give one another."""
