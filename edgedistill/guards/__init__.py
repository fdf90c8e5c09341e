"""What a runtime interprets is read here first, against lists of what is allowed; where it can be, it is rebuilt."""
