"""The engine: it turns plans into tokens and tokens into text.

`engine` owns the order of a step (plan, execute, commit), `executor` where it runs, `model_runner` what runs, `batch` the
flat arrays it runs on, and `llm` is the Python front door.
"""
