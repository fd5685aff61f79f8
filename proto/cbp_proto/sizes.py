"""How large a message may be, whoever sends it."""

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""What clients of this project take in one message, and send in one. Others take what their gRPC is told, 4 MiB by
itself."""
