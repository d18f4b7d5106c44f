"""`pointsman bench serve`: a load client for any OpenAI endpoint, apart from the engine.

It measures servers as a client sees them and shares nothing with ours: `http` and `events` read what a server sends however it is cut,
`backends` give it meaning, `load` keeps requests running and stamps what arrives, `metrics` is arithmetic on those stamps.
What is asked comes from `datasets` and `traces`, its exact lengths from `prompts`, its moments from `arrivals`.
"""
