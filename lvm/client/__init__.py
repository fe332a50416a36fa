"""A client for Python: arrays or text in, objects with arrays out, over the binary format.

    client = Client("http://127.0.0.1:8000")
    client.predict(contexts).vectors

Errors are the classes of the service (`lvm.errors`), so `except Overloaded` works here too. A request that cannot be
sent is a `ValueError`. The service only computes, so a request may be repeated: the client retries after rejections
with Retry-After, and after broken connections.
"""

from lvm.client.answers import (
    AliasState,
    Answer,
    Article,
    ArticleEntry,
    ArticlePassage,
    Articles,
    Embeddings,
    Health,
    MadeBy,
    Models,
    ModelVersion,
    Passage,
    Prediction,
    Retrieval,
    TextAnswer,
    Windows,
)
from lvm.client.clients import CONCURRENCY, AsyncClient, Client
from lvm.client.failures import BadAnswer, UnknownRoute, Unreachable, error_from, is_retryable
from lvm.client.flow import Default, RequestFlow
from lvm.client.requests import Filter, Floats, Ids, Profile, ReadAs, Text, auth_headers, trace_headers
from lvm.client.responses import MAX_ANSWER_BYTES
from lvm.errors import Expired, ServiceError

__all__ = [
    "CONCURRENCY",
    "MAX_ANSWER_BYTES",
    "AliasState",
    "Answer",
    "Article",
    "ArticleEntry",
    "ArticlePassage",
    "Articles",
    "AsyncClient",
    "BadAnswer",
    "Client",
    "Default",
    "Embeddings",
    "Expired",
    "Filter",
    "Floats",
    "Health",
    "Ids",
    "MadeBy",
    "ModelVersion",
    "Models",
    "Passage",
    "Prediction",
    "Profile",
    "ReadAs",
    "RequestFlow",
    "Retrieval",
    "ServiceError",
    "Text",
    "TextAnswer",
    "UnknownRoute",
    "Unreachable",
    "Windows",
    "auth_headers",
    "error_from",
    "is_retryable",
    "trace_headers",
]
