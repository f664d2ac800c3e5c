"""Prepared rows: samples packed once, and found again by everything that decides them."""
