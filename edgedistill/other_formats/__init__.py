"""Formats beside GGUF and ONNX."""
