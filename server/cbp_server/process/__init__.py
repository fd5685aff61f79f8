"""What holds for a process as a whole: its memory, its log, where it listens."""
