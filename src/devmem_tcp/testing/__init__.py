"""For testing programs and backends: the contract's tests, faults, the leak oracle, and byte patterns."""
