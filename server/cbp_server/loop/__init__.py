"""The event loop shared: long work in turns, waiting for changes."""
