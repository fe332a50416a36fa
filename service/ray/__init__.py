"""The service on Ray Serve: the graph, and what Ray's errors and ours are to each other. The cluster is Ray's.

The ingress is the app as it is, and borrows its nets; `primary`, `fallback` and `retriever` are deployments of their
own. A replica of these is one alias's engine, which follows the registry as a server's does: a promotion reaches each
within `reload_s`, nothing is restarted, and every answer says which version and which replica made it.
"""
