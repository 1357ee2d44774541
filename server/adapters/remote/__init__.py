"""Adapters that lie elsewhere: a hub, an object store, a web server, a folder; fetched into the store.

address    what a source may look like, and which ones the operator allows
places     what an address leads to: the files there, their sizes, their bytes
local, web, hub, buckets     one kind of place each
transfer   a place's files into an upload of the store
fetches    all fetches of a server: queue, progress, cancelling, failures
"""
