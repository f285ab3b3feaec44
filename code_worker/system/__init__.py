"""What this process may use of its machine: files, processes, cores and memory, the terminal."""
