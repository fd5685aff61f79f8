"""Hosts continual learners: gRPC and HTTP in the front process, learners in an engine process."""
