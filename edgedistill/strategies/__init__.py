"""How stages are put together: distilling, quantization-aware."""
