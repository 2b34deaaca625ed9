"""Every dataset behind one schema: ``load_corpus`` recognises the form, ``split_corpus`` says what is asked of whom.

Documents and questions have a schema of their own: ``load_text_corpus``.
"""

import importlib

_HOMES = {
    "Corpus": "schema",
    "RetrievalSplits": "splits",
    "TextCorpus": "documents",
    "flatten_captions": "splits",
    "gallery_rows": "splits",
    "is_text_corpus": "documents",
    "load_corpus": "load",
    "load_splits": "load",
    "load_text_corpus": "documents",
    "split_corpus": "splits",
    "training_captions": "splits",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    """Imports what is asked for when it is asked for: the arguments alone need no ``datasets``, and --help is quick."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
