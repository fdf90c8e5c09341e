"""What a build will make, and what is refused before any work."""
