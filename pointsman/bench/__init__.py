"""What measures the engine: accuracy on built-in problems, and speed.

The problems are generated (`arithmetic`, `tools`), so a number needs no download, and split by hash into those that training
may see and those held out. Every command prints a table for people and ends with one line of JSON.
"""
