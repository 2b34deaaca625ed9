"""What a T5 from scratch may start from instead of random weights."""
