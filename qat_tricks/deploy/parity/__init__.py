"""Whether the network that runs gives the logits of the network that was simulated."""
