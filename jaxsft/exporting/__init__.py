"""What `python -m jaxsft.export` is made of: writing, checking in another library, describing."""
