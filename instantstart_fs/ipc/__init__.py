"""How processes and threads of the product talk: threads with a deadline, child processes, packets and lines."""
