"""The filler: brings bytes from origins into the store. Import its modules by name.

Nothing is imported here, since the fetch processes (worker.py) are kept small: no trio, no store, no index.
"""
