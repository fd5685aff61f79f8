"""Batches on their way in: sessions, the producer protocol, the order of changes, the budget of bytes."""
