"""Examples on their way into a learner: checked batches, those that wait for a whole step, the probe."""
