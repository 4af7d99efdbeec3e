"""Compares the network that runs with the network that was simulated."""
