"""The Hugging Face hub: data sets and models of it, pinned, checked, resumed."""
