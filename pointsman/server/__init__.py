"""The HTTP side, and the engine's process behind it.

    client - app - prompts - bridge - wire ~ socket ~ wire - engine_process - engine

Two processes, so that streaming hundreds of answers never delays a step. Only `engine_process` may import the engine: this side
of the socket comes up while the other still loads the tensor library and the weights.
"""
