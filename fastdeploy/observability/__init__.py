"""What a running server tells: log files, start-up and status lines, metrics."""
