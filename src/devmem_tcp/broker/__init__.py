"""The privilege broker: binds, steers and leases queues for programs that may not do so themselves."""
