"""Which models quantdit knows, and what it knows of them."""
