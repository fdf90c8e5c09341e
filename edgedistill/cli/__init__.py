"""The commands, their options, results as tables for people."""
