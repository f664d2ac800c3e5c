"""What `python -m jaxsft.inspect` is made of: prepared rows, as a screen and a page."""
