"""What an app needs beside a package.

folder.py       the folder: configuration, expected outputs, README
tokenizer.py    the tokenizer, if the Swift package knows it
companions.md   the README's text
The Swift package itself is Package.swift and swift/ at the top of the repository.
"""
