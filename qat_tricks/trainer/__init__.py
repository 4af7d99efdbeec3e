"""All that knows Lightning's trainer: the session of a run, the tricks as callbacks, checkpoints."""
