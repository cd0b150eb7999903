"""The one module that takes a linear's place."""
