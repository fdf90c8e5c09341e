"""What the user asks for: recipes, target profiles, one YAML loader."""
