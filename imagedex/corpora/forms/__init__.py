"""The forms a corpus comes in, one a file: how each is recognised and how it is read."""
