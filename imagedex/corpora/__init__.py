"""Every dataset behind one schema: ``load_corpus`` recognises the form, ``split_corpus`` says what is asked of whom."""

from imagedex.corpora.load import load_corpus
from imagedex.corpora.schema import Corpus
from imagedex.corpora.splits import RetrievalSplits, flatten_captions, split_corpus

__all__ = ["Corpus", "RetrievalSplits", "flatten_captions", "load_corpus", "split_corpus"]
