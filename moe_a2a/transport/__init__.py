"""Moving rows between ranks: shared memory inside a host, the Mooncake Transfer Engine between hosts.

`protocol.Transport` is what both are; everything above it does not know how rows travel.
"""
