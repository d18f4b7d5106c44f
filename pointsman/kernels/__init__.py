"""Arrays and tensors in, tensors out: the operations of a model, each in one or more implementations.

`reference` says what an operation is, in plain torch. `operations` has the table of each one's implementations, `candidates` why one cannot
serve on a device, which is asked where there are neither tensors nor the device.
"""
