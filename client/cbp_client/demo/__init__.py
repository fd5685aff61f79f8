"""The demo: handwritten digits under ever new pixel permutations, streamed to learners that differ in their resets."""
