"""What ``xditd demo`` needs beyond the client: small seeded checkpoints in the layouts that users have."""
