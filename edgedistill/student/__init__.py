"""How a student starts: designed, cut, pruned, trimmed, with adapters."""
