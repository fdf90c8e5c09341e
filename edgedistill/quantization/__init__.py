"""What quantizing means and costs, the same for every format."""
