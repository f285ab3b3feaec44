"""The machine of this process: files, processes, cores and memory, the terminal."""
