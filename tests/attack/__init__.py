"""Generators of wrong artifacts and hostile input, seeded. Tests plant a few, benchmarks/attack.py all of them."""
