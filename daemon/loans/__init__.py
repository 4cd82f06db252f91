"""Components that clients lend: who owns each and until when, and when workers map and unmap it."""
