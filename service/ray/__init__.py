"""The service on Ray Serve: the graph of deployments, and clients for them. The cluster is Ray's.

The ingress is the app, with the deployments as its engine provider; every alias that is set, but `candidate`, has a
deployment. A replica runs the engine of one alias and follows the registry as a server does: a promotion reaches
it within `reload_s`, nothing is restarted, and every answer names the version and the replica that made it.
"""
