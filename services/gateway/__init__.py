"""The gateway: tier 1's one door for devices that speak HTTP. It checks and passes on; it changes and signs nothing.

`admit.py` says who asks and what may pass, `uploads.py` keeps payloads that are not whole yet, `places.py` remembers
where an update went, `app.py` is the requests, `server.py` bounds what a connection may take, `__main__.py` is the
command.
"""
