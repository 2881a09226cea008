"""What is present and what was asked for, durably: LMDB with one writer thread. Can be rebuilt from the slots."""
