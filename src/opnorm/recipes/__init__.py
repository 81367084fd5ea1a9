"""Training loops that show what the norms are for. They return data and print nothing."""
