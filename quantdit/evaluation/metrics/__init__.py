"""Every measure, with its table of units and margins."""
