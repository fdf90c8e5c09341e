"""The teacher: obtained, trained, live, cached."""
