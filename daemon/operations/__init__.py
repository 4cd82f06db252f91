"""Parts that do not depend on xDiT: event loop, log buffer, metrics, runtime folder, signals, systemd."""
