"""Sizes and memory, predicted."""
