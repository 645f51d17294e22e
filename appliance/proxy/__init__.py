"""The data path: redirect, listeners, protocol detection, the session driver and its upstream."""
