"""What runs the model to see what reaches its layers."""
