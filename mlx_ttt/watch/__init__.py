"""A page that shows what a model learns while it reads: as a file, or live in a browser."""
