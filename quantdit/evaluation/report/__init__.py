"""What people look at: the HTML page, the Markdown tables, pictures and clips."""
