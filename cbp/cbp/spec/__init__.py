"""What a learner is, in records: its network, optimizer, resets. They describe; they build nothing and call nothing."""
