"""The version of the platform; in a file of its own, so that any room can import it."""

__all__ = ["__version__"]

__version__ = "0.1.0"
