"""HTTP in, HTTP out: connections, the gateway that every request passes, codecs and routes."""
