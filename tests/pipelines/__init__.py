"""Raw input through the original against raw input through the exported folder: tiny checkpoints of every kind."""
