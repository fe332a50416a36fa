"""Capacity on paper: measured costs, a simulation of the service that spends them, and the plan that follows."""
