"""What flows between the stages, and what a bundle holds."""
