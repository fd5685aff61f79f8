"""What Prometheus reads, of the server and of each learner, and its text."""
