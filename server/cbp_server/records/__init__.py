"""What readers see of learners: plain values that any room may hold, and that decide nothing."""
