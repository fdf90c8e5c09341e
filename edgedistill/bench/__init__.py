"""See edgedistill/pipeline.py for where this stands in the flow."""
