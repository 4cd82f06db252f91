"""The sockets to clients and ranks: who is at the other end, and how messages leave."""
