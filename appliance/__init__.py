"""The product: redirect, proxies, attribution, live control and the command line."""
