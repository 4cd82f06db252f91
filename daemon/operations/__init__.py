"""What every long-lived process needs: an event loop, logs, counters, a runtime folder, a service manager."""
