"""The lab: a virtual machine with a stock kernel and driver, and a NIC that is no hardware but Python."""
