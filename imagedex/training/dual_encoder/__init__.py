"""Training of XMatchingModel."""
