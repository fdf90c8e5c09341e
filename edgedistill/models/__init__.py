"""Model folders: found, checked, hashed, opened; families and their tensors."""
