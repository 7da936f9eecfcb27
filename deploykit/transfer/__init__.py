"""Transfer learning: swap the head, train it, prove the body."""
