"""The FUSE mount: translates the kernel's requests into calls of the Vfs. What is served is decided in the library."""
