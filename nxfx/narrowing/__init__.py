"""What narrowing is made of: the book of narrowed values, verdicts in words, and the float64 half of narrow-64bit."""
