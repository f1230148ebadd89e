"""Where accepted requests wait for a data-parallel rank: in this server, or shared with others through Redis."""
