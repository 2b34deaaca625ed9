"""Pictures on disk that grow and shrink, and the search over them: a folder of its own, tied to one model."""
