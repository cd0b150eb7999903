"""Write a checkpoint in a form that other programs read."""
