"""Text corpora: documents and the questions they answer."""

from imagedex.corpora.documents.folders import is_text_corpus, load_documents, load_text_corpus
from imagedex.corpora.documents.text_corpus import TextCorpus

__all__ = ["TextCorpus", "is_text_corpus", "load_documents", "load_text_corpus"]
