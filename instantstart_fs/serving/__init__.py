"""The read path: opens, reads, their waits for the filler, and bind mounts over the mount. What lies in the store
is read here; what comes into it is the filler's."""
