"""A Google virtual NIC (gVNIC) as the stock gve driver drives it, in Python.

``device.Gvnic`` is the device; ``faults.Faults`` what can go wrong with it on request. Facts about the device are from
the driver's sources, drivers/net/ethernet/google/gve; which file and function, each module says.
"""
