"""Codecs that protocols share: bounded buffers, framing, statement analysis, value decoding. No
I/O.
"""
