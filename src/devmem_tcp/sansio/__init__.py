"""State machines with no fd, clock or thread: tokens and completions. Time is an argument."""
