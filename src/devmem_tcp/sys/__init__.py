"""Raw system calls: ``calls`` is the only module that makes them."""
