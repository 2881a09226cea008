"""Communication between the product's processes and threads: threads with a deadline, child processes, packets and
lines; what servers do alike with their sockets."""
