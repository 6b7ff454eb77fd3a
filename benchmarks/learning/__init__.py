"""Does it matter what a model learns while it reads? The figures of docs/learning.md, one command for each."""
