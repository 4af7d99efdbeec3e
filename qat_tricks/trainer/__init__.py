"""The session of a run, tricks as callbacks, checkpoints: all that knows Lightning's trainer."""
