"""What an RL trainer needs beside the engine: records in the forms that frameworks eat, and the trainer's own model made to route as
the rollout did.
"""
