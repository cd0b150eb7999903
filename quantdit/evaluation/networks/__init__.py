"""What turns pictures into features, a file for each network."""
