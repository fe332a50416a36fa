"""What the service is measured beside; each is a process of its own: `python -m bench.peers.naive`."""
