"""Benchmarks: speed and memory, measured or estimated; nothing here is imported by jaxsft."""
