"""The ZeroMQ sockets to clients and ranks: peer credentials, client sessions, sending replies."""
