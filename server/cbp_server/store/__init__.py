"""What lasts: the learners' state on disk."""
