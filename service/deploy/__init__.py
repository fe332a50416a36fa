"""Deployments: which version serves each alias, how that changes, and how a new version is tried."""
