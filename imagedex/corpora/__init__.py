"""Every dataset behind one schema: ``load_corpus`` recognises the form, ``split_corpus`` says what is asked of whom.

Documents and questions have a schema of their own: ``load_text_corpus``.
"""

from imagedex.corpora.documents import is_text_corpus, load_text_corpus
from imagedex.corpora.load import load_corpus
from imagedex.corpora.schema import Corpus
from imagedex.corpora.splits import RetrievalSplits, flatten_captions, split_corpus
from imagedex.corpora.text_corpus import TextCorpus

__all__ = [
    "Corpus",
    "RetrievalSplits",
    "TextCorpus",
    "flatten_captions",
    "is_text_corpus",
    "load_corpus",
    "load_text_corpus",
    "split_corpus",
]
