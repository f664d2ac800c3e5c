"""What a model does on rows that it has not seen: scores, their statistics, and a page of them."""
