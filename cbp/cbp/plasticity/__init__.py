"""How plastic a learner still is: the measures, and the samples in which they are kept."""
