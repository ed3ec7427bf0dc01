"""The version of tokprune, named once. It is also the version that a bundle's manifest records."""

__version__ = "0.1.0"
