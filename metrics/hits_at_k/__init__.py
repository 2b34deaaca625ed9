"""Hits@k and reciprocal rank with ties counted against the model; everything is in ``hits_at_k.py``."""
