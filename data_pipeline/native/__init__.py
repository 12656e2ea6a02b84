"""Small C kernels for what the data pipeline does to every byte; built by `make setup`, called through ctypes.

The library needs no Python headers and knows nothing of Python: arrays and sizes in, arrays out. ctypes lets go of the
interpreter's lock during a call.
"""
