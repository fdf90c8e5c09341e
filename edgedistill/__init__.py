"""Distil a large model into a small one that a device can run, and prove what it kept."""

__version__ = "0.1.0"
