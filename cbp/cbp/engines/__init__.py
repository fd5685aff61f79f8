"""What takes a learner's steps: one interface, and an implementation for each kind of network and device."""
