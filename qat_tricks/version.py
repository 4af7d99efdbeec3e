"""The package's version, for files and caches that name what made them."""

__version__ = "0.1.0"
