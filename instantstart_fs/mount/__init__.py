"""What processes see: the kernel's requests translated to the library's View, and the life of the mount."""
