"""What holds for a process as a whole: its memory, its log, its descriptors, where it listens."""
