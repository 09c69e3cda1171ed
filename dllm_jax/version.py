"""The version, which stands beside results: by itself, so that whoever writes it down need not import the package."""

__version__ = "0.1.0"
