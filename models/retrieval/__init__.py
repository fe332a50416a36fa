"""Retrieval: corpora, indexes, retrievers and rerankers."""
