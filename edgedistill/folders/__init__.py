"""Artifacts that are folders or programs of their own runtimes: bitsandbytes, ExecuTorch."""
