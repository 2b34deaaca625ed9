"""A dual encoder: how it is opened, sentences and pictures to vectors, and the store of vectors on disk."""
