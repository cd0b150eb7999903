"""Files, memory, threads, progress bars: what every package stands on."""
