"""The version of the Python package; the build reads it from here."""

__version__ = "1.3.0.dev0"
