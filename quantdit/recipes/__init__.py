"""What a user asks for: rules, presets, the paper methods."""
