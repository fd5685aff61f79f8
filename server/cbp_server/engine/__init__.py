"""Executes steps: the learners' tensors live in one engine process, behind the messages of `messages`."""
