"""The host and what it does with learners: how they come, change, rest, are saved and brought back."""
